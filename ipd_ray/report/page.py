"""The page: what to read first, the headline, the differences of several runs, the sections, the settings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from string import Template

from ipd_ray.files import write_atomic
from ipd_ray.report import figures
from ipd_ray.report.findings import findings
from ipd_ray.report.markup import escape, maybe, panel, panels_of, percent, remark
from ipd_ray.report.sections import NO_FILM, SECTIONS
from ipd_ray.report.source import VARIANTS, View, fingerprint_of, number, open_views
from ipd_ray.runs import human_seconds, plans_in
from ipd_ray.storage import Folder
from ipd_ray.text import readable

_HERE = Path(__file__).parent
_UNIT_INTERVAL = 1.96


def build_report(folders: Sequence[str | Path | Folder], output: Path) -> Path:
    """Write the report of one run folder, or of several side by side, and return its path.

    A report that is there and would come out the same is left as it is. Raises UserError for a folder that is no run.
    """
    views = open_views(folders)
    code = [path.read_bytes() for path in sorted(_HERE.glob("*")) if path.suffix in (".py", ".html")]
    identity = hashlib.sha256(b"".join([*code, fingerprint_of(views).encode()])).hexdigest()
    output = Path(output)
    if _is_there(output, identity):
        return output
    several = len(views) > 1
    body = [_read_first(views), _headline(views)]
    contents = [("headline", "Headline")]
    if several:
        body.append(_differences(views))
        contents.append(("differences", "Differences"))
    for section in SECTIONS:
        parts = [f'<section><h2 id="{section.id}">{section.title}</h2><p class="read">{section.read}</p>']
        for view in views:
            parts.append((f"<h3>{escape(view.label)}</h3>" if several else "") + section.make(view))
        body.append("".join(parts) + "</section>")
        contents.append((section.id, section.title))
    body.append(_identity(views))
    contents.append(("identity", "Settings"))
    datasets = ", ".join(dict.fromkeys(str(v.identity["dataset"]) for v in views))
    title = f"{len(views)} runs side by side" if several else views[0].label
    seeds = ", ".join(str(v.identity["seed"]) for v in views)
    return write_page(output, title, f"{datasets} · seed {seeds}", contents, body, identity)


def write_page(
    output: Path, title: str, subtitle: str, contents: Sequence[tuple[str, str]], body: Sequence[str],
    identity: str = "",
) -> Path:
    """Write a page of sections and return its path. contents: (id, title) of each section; body: their HTML."""
    page = Template((_HERE / "page.html").read_text(encoding="utf-8")).substitute(
        fingerprint=identity,
        title=escape(title),
        subtitle=f"{escape(subtitle)} · ipd_ray",
        contents="".join(f'<a href="#{id}">{name}</a>' for id, name in contents),
        body="\n".join(body),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, page)
    return output


def _is_there(output: Path, identity: str) -> bool:
    """A page without a film is made again: what kept the environment from rendering may have been mended."""
    if not output.is_file():
        return False
    page = output.read_text(encoding="utf-8", errors="replace")
    return f'content="{identity}"' in page[:1000] and NO_FILM not in page


# ---- the top


def _read_first(views: Sequence[View]) -> str:
    lines, warned = [], 0
    for view in views:
        prefix = f"<b>{escape(view.label)}</b>: " if len(views) > 1 else ""
        for finding in findings(view):
            warned += finding.warning
            kind = "" if finding.warning else ' class="remark"'
            lines.append(f'<li{kind}>{prefix}{escape(finding.text)}&nbsp;<a href="#{finding.where}">see</a></li>')
    if not lines:
        said = "<p>No diagnostic stands out: evidence that each part learned, not proof.</p>"
    else:
        said = f"<ul>{''.join(lines)}</ul>"
    return (
        f'<section class="first{" warned" if warned else ""}" id="read-first"><h2>Read this first</h2>{said}</section>'
    )


def _headline(views: Sequence[View]) -> str:
    groups: dict[str, list[tuple[str, list[str], bool]]] = {}

    def add(group: str, name: str, value: Callable[[View], str | None], strong: bool = False) -> None:
        cells = [value(view) for view in views]
        if any(cell is not None for cell in cells):
            groups.setdefault(group, []).append((name, ["–" if c is None else c for c in cells], strong))

    def score(view: View, variant: str) -> str | None:
        found = view.summary.get(variant, {})
        mean, std = number(found, "return_mean"), number(found, "return_std")
        return None if mean is None else f"{readable(mean)} ± {readable(std)}"

    def normalised(view: View, variant: str) -> str | None:
        return maybe(number(view.summary.get(variant, {}), "normalised"))

    def success(view: View, variant: str) -> str | None:
        value = number(view.summary.get(variant, {}), "success")
        return None if value is None else percent(value)

    def data(view: View, name: str) -> str | None:
        return maybe(number(view.summary.get("data", {}), name))

    def imagined(view: View, name: str) -> float | None:
        return number(view.summary.get("imagined", {}), name)

    add("Return", "data, mean", partial(data, name="return_mean"))
    add("Return", "data, best episode", partial(data, name="return_max"))
    for variant, name in VARIANTS.items():
        add("Return", name, partial(score, variant=variant), variant == "policy")
    add("Return", "episodes evaluated", lambda v: maybe(number(v.summary.get("policy", {}), "episodes")))
    for variant, name in VARIANTS.items():
        add("Episodes that succeed", name, partial(success, variant=variant), variant == "policy")
    add("Normalised (0 to 100)", "data, mean", partial(normalised, variant="data"))
    for variant, name in VARIANTS.items():
        add("Normalised (0 to 100)", name, partial(normalised, variant=variant), variant == "policy")

    def accepted(view: View) -> str | None:
        count, total, rate = (imagined(view, k) for k in ("accepted", "segments", "accept_rate"))
        return None if count is None else f"{readable(count)} of {readable(total)} ({percent(rate)})"

    def worth(view: View) -> str | None:
        mine, own = imagined(view, "imagined_mean"), imagined(view, "own_mean")
        if mine is None or own is None:
            return None if imagined(view, "accepted") is None else "–"
        return f"{readable(view.raw(mine))} against {readable(view.raw(own))}"

    def promise(view: View) -> str | None:
        found = view.summary.get("policy", {})
        promised, collected = number(found, "value_at_start"), number(found, "discounted_mean")
        return None if promised is None or collected is None else f"{readable(promised)} against {readable(collected)}"

    def chosen(view: View) -> str | None:
        kept = view.summary.get("chosen")
        return f"{plans_in(view.summary)} plans, {kept['step']:,} updates" if kept else None

    def offline(view: View) -> str | None:
        found = view.summary.get("fitted_q", {})
        value, sem, log = (number(found, k) for k in ("value_mean", "value_sem", "log_value"))
        if value is None:
            return None
        return f"{readable(value)} ± {readable(sem)}, the log's {readable(log)}"

    add("Without an environment", "fitted Q: discounted value on held-out episodes (a proxy)", offline, True)
    add("Imagination", "policy kept", chosen, True)
    add("Imagination", "accepted segments", accepted, True)
    add("Imagination", "accepted steps", lambda v: maybe(imagined(v, "accepted_steps")))
    add("Imagination", "accepted: imagined I against the log's B", worth)
    add("Imagination", "start: V against discounted return", promise)
    add("Data", "dataset", lambda v: escape(v.identity["dataset"]))
    add("Data", "episodes", partial(data, name="episodes"))
    add("Data", "steps", partial(data, name="steps"))
    names = list(dict.fromkeys(name for view in views for name in view.summary.get("seconds", {})))

    def took(view: View, name: str) -> str | None:
        value = number(view.summary.get("seconds", {}), name)
        return None if value is None else human_seconds(value)

    for name in names:
        add("Time", escape(name), partial(took, name=name))
    add(
        "Time",
        "all steps",
        lambda v: human_seconds(sum(v.summary["seconds"].values())) if v.summary.get("seconds") else None,
    )
    dots = _score_dots(views)
    missing = [v for v in views if not v.summary]
    said = "".join(remark(f"{escape(v.label)}: summary.json is missing, since the run has not ended.") for v in missing)
    return (
        '<section><h2 id="headline">Headline</h2><p class="read">Returns are raw and undiscounted, mean ± '
        "standard deviation "
        "over episodes. <b>Bad:</b> a policy at or under the data's mean, or no better than its own ablations "
        "(BC: imitation "
        "alone; no imagination: the same policy without imagined segments).</p>"
        f"{said}{_cards(groups, dots) if len(views) == 1 else _wide_table(groups, views) + dots}</section>"
    )


def _cards(groups: Mapping[str, list[tuple[str, list[str], bool]]], more: str) -> str:
    tables = []
    for group, rows in groups.items():
        lines = "".join(
            f'<tr{_strong(s)}><th scope="row">{name}</th><td>{cells[0]}</td></tr>' for name, cells, s in rows
        )
        tables.append(f"<div><h4>{group}</h4><table>{lines}</table></div>")
    return f'<div class="cards">{"".join(tables)}{more}</div>'


def _wide_table(groups: Mapping[str, list[tuple[str, list[str], bool]]], views: Sequence[View]) -> str:
    head = "".join(f'<th scope="col">{escape(view.label)}</th>' for view in views)
    lines = []
    for group, rows in groups.items():
        lines.append(f'<tr class="group"><th colspan="{len(views) + 1}">{group}</th></tr>')
        for name, cells, strong in rows:
            lines.append(
                f'<tr{_strong(strong)}><th scope="row">{name}</th>{"".join(f"<td>{c}</td>" for c in cells)}</tr>'
            )
    return (
        f'<div class="scroll"><table class="many"><thead><tr><th></th>{head}</tr></thead>{"".join(lines)}</table></div>'
    )


def _strong(strong: bool) -> str:
    return ' class="strong"' if strong else ""


def _score_dots(views: Sequence[View]) -> str:
    panels = []
    datasets = dict.fromkeys(str(view.identity["dataset"]) for view in views)
    for dataset in datasets:
        rows, best = [], {}
        for view in views:
            if view.identity["dataset"] != dataset:
                continue
            dots = []
            for variant, name in {"data": "data", **VARIANTS}.items():
                found = view.summary.get(variant, {})
                mean, std, count = (number(found, k) for k in ("return_mean", "return_std", "episodes"))
                if mean is not None:
                    dots.append((name, mean, _UNIT_INTERVAL * (std or 0.0) / max(count or 1.0, 1.0) ** 0.5))
            if len(dots) > 1:
                rows.append((view.label if len(views) > 1 else "", dots))
                most = number(view.summary["data"], "return_max")
                if most is not None:
                    best[rows[-1][0]] = most
        if rows:
            title = f"Mean return{f', {escape(dataset)}' if len(datasets) > 1 else ''}"
            panels.append(
                panel(
                    title,
                    figures.score_dots(rows, best=best, x="return", alt=f"Mean returns with intervals, {dataset}"),
                    "95 % intervals of the mean over each one's episodes. They say nothing of another training "
                    "seed: for that, "
                    "compare runs of several seeds.",
                )
            )
    return panels_of(panels, wide=True) if len(views) > 1 else "".join(panels)


def _differences(views: Sequence[View]) -> str:
    names = list(dict.fromkeys(name for view in views for name in view.settings))
    rows = [("dataset", [v.identity["dataset"] for v in views]), ("seed", [v.identity["seed"] for v in views])]
    rows += [(name, [view.settings.get(name) for view in views]) for name in names if name != "seed"]
    lines = [
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(c)}</td>" for c in cells)}</tr>'
        for name, cells in rows
        if any(c != cells[0] for c in cells[1:])
    ]
    parts = list(dict.fromkeys(name for view in views for name in view.links))
    shared = [p for p in parts if len({v.links.get(p, {}).get("key") for v in views}) == 1]
    head = "".join(f'<th scope="col">{escape(view.label)}</th>' for view in views)
    table = (
        f'<div class="scroll"><table class="many"><thead><tr><th></th>{head}</tr></thead>{"".join(lines)}</table></div>'
        if lines
        else remark("No setting differs.")
    )
    return (
        '<section><h2 id="differences">Differences</h2><p class="read">Settings that are not the same in all '
        "runs. What two "
        "runs share was computed once. <b>Bad:</b> more than one difference, where the question is what one of "
        "them does.</p>"
        f'{table}<p class="sub">Shared by all: {escape(", ".join(shared)) or "nothing"}.</p></section>'
    )


def _identity(views: Sequence[View]) -> str:
    parts = list(dict.fromkeys(name for view in views for name in view.links))
    head = "".join(f'<th scope="col">{escape(view.label)}</th>' for view in views)
    cells = "".join(f"<td><code>{escape(str(v.identity['content_hash'])[:12])}</code></td>" for v in views)
    lines = [f'<tr><th scope="row">data</th>{cells}</tr>']
    for name in parts:
        cells = "".join(
            f"<td><code>{escape(str(v.links[name]['key'])[:12])}</code>{'' if v.part(name) else ' (missing)'}</td>"
            if name in v.links
            else "<td>–</td>"
            for v in views
        )
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    configs = "".join(
        f"<details><summary>All settings{f' of {escape(view.label)}' if len(views) > 1 else ''}</summary><pre>"
        + escape("\n".join(f"{name}: {value}" for name, value in view.settings.items()))
        + "</pre></details>"
        for view in views
    )
    return (
        '<section><h2 id="identity">Settings</h2><p class="read">Equal keys are equal results on one numeric '
        "platform. "
        "<b>Bad:</b> a missing artifact: its section above is empty until the run is made again.</p>"
        '<div class="scroll"><table class="many"><thead><tr><th>key '
        f"of</th>{head}</tr></thead>{''.join(lines)}</table></div>{configs}</section>"
    )
