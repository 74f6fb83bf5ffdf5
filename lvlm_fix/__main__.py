"""`python -m lvlm_fix` is `lvlm-fix`."""

from lvlm_fix.cli import main

main()
