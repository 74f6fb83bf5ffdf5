"""The Gradio demo: `lvlm-fix demo`, or `python demo/app.py` as a Hugging Face Space."""
