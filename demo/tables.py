"""The probe's table, as HTML."""

from __future__ import annotations

from collections.abc import Sequence

from lvlm_fix.evals.report_markup import Markup, element


def probe_table(
    plain: dict[str, float], fixed: dict[str, float], truth: Sequence[str] | None, left: int
) -> Markup:
    """Categories with P(yes) of both, largest disagreement first; `left` are still to be asked."""
    order = sorted(fixed, key=lambda name: -abs(plain[name] - fixed[name]))
    heads = [
        "object",
        "plain P(yes)",
        "fixed P(yes)",
        "difference",
        *(["in the picture"] if truth is not None else []),
    ]
    rows = []
    for name in order:
        wrong = [truth is not None and (values[name] > 0.5) != (name in truth) for values in (plain, fixed)]
        cells = [
            element("th", name, scope="row"),
            _share(plain[name], wrong[0]),
            _share(fixed[name], wrong[1]),
        ]
        cells.append(element("td", _difference(fixed[name] - plain[name])))
        if truth is not None:
            cells.append(element("td", "yes" if name in truth else "no"))
        rows.append(element("tr", *cells))
    note = (
        f"{left} questions to go."
        if left
        else "All asked. P(yes) is the probability that the answer begins with yes."
    )
    if truth is not None and not left:
        errors = [sum((values[name] > 0.5) != (name in truth) for name in order) for values in (plain, fixed)]
        note += f" Wrong of {len(order)}: plain {errors[0]}, fixed {errors[1]}; each is marked with ✗."
    body = element("tbody", *rows)
    table = element(
        "table", element("thead", element("tr", *(element("th", one, scope="col") for one in heads))), body
    )
    return element(
        "div",
        element("p", note, role="status", class_="running" if left else None),
        element("div", table, class_="scroll"),
        class_="probe",
    )


def _difference(value: float) -> str:
    """With a sign, but for what rounds to nothing.

    >>> _difference(-0.004), _difference(-0.126)
    ('0.00', '-0.13')
    """
    return f"{value:+.2f}" if round(value, 2) else "0.00"


def _share(value: float, wrong: bool) -> Markup:
    bar = element(
        "span", element("span", "", style=f"width:{100 * value:.1f}%"), class_="bar", aria_hidden="true"
    )
    sign = element("span", " ✗", class_="sign", title="wrong") if wrong else ""
    return element("td", bar, " ", element("span", f"{value:.2f}", class_="value"), sign, class_="share")
