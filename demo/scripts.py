"""The page's JavaScript: what is shown at once, without asking the server, when a run starts, stops or grows old."""

from __future__ import annotations

import json

from lvlm_fix.demo import pieces

_PHONE = "if (innerWidth < 640) document.getElementById('status').scrollIntoView({block: 'start'});"
"""On a phone the answers stand below the switches."""

_FINISH = """
const finish = (html, said) => {
  const holder = document.createElement('template');
  holder.innerHTML = html;
  for (const box of holder.content.querySelectorAll('.running')) {
    box.classList.remove('running');
    box.querySelectorAll('.caret').forEach(one => one.remove());
    if (box.matches('.answer')) {
      const note = document.createElement('p');
      note.className = 'muted';
      note.textContent = said;
      box.append(note);
    } else {
      const left = box.textContent.includes('to go') ? ' ' + box.textContent : '';
      box.textContent = said + left;
    }
  }
  return holder.innerHTML;
};
"""
"""Ends what is marked as running: an answer keeps what was said so far, a probe how many questions are left."""

STARTED = f"""() => {{ {_PHONE} window.runEnds = null; return {
    json.dumps(
        [pieces.status("Waiting for a turn.", running=True), pieces.waiting(), pieces.waiting(), "", ""]
    )
}; }}"""
"""To status, both answers, the word and the drawings."""

_STOPPED = json.dumps([pieces.status("Stopped."), "Stopped."])
_FAILED = json.dumps([pieces.status("Not answered: the message says why."), "Not answered."])

STOPPED = f"""(status, plain, fixed) => {{ {_FINISH}
  if (!/running/.test(status + plain + fixed)) return [status, plain, fixed];
  window.runEnds = {_STOPPED};
  return [window.runEnds[0], ...[plain, fixed].map(html => finish(html, window.runEnds[1]))];
}}"""
FAILED = f"""(status, plain, fixed) => {{ {_FINISH}
  if (!/running/.test(status + plain + fixed)) return [status, plain, fixed];
  const [told, note] = window.runEnds ?? {_FAILED};
  return [told, finish(plain, note), finish(fixed, note)];
}}"""
"""From and to status and both answers, where they are running. A run that is stopped counts as failed, too, and its
last word may still come in between: then this ends it with what the stop had to say."""

_CUT_SHORT = pieces.status("Stopped, for the picture is another one now: press Compare.", stale=True)
_OLD = pieces.status("The answers below are about the picture before: press Compare.", stale=True)

OTHER_PICTURE = f"""(status, plain, fixed, table) => {{ {_FINISH}
  const running = /running/.test(status + plain + fixed);
  const note = 'Stopped: the picture is another one now.';
  if (/running/.test(table)) window.probeEnds = note;
  const asked = finish(table, note).replace('class="probe"', 'class="probe stale"');
  if (running) window.runEnds = [{json.dumps(_CUT_SHORT)}, note];
  if (running) return [window.runEnds[0], finish(plain, note), finish(fixed, note), asked];
  return [/answer said/.test(plain + fixed) ? {json.dumps(_OLD)} : status, plain, fixed, asked];
}}"""
"""From and to status, both answers and the probe's table: what is there is about the picture before."""

NO_SAMPLE = (
    "() => document.querySelectorAll('#samples [data-pick]')"
    ".forEach(one => one.setAttribute('aria-pressed', false))"
)
"""A picture of the visitor's own: no sample is pressed."""

PROBE_STARTED = (
    "() => { window.probeEnds = null; "
    f"return {json.dumps(pieces.probe_note('Waiting for a turn.', running=True))}; }}"
)
PROBE_STOPPED = f"table => {{ {_FINISH} window.probeEnds = 'Stopped.'; return finish(table, 'Stopped.'); }}"
PROBE_FAILED = (
    f"table => {{ {_FINISH} return finish(table, window.probeEnds ?? 'Not asked: the message says why.'); }}"
)
"""From and to the probe's table."""
