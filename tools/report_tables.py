"""Tables of measured figures, from reports/*/*.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markdown_table import Row, markdown

from qkit.planning.quality_levels import DEFAULT, LEVELS

REPORTS = Path(__file__).parents[1] / "reports"
# Option of a report -> its name today: reports keep the names of the day they were made.
NEW_NAMES = {"--written": "--synthetic-samples", "weigh": "loss_weighted"}
BEST = "gptq signed=true sweeps=4 compensate=0.5", "signround weigh=true --written=192"


def report(name: str) -> Any:
    """The content of reports/NAME.json."""
    return json.loads((REPORTS / f"{name}.json").read_text(encoding="utf-8"))


def mb(size: float) -> str:
    """Megabytes of 10^6 bytes."""
    return f"{size / 1e6:.2f}"


def interval(values: list[float], digits: int, signed: bool = True) -> str:
    """A figure with its 95 % interval."""
    value, low, high = values
    sign = "+" if signed else ""
    return f"{value:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def named(kind: str) -> str:
    """'qkit signround weigh=true --written=192' as one would give it: `signround`, `weigh=true`, `--written 192`."""
    tool, method, *options = kind.split()
    if tool != "qkit":
        return {"AutoRound": "AutoRound", "llm-compressor": "llm-compressor, GPTQ"}[tool]
    for old, new in NEW_NAMES.items():
        options = [o.replace(f"{old}=", f"{new}=") if o.startswith(f"{old}=") else o for o in options]
    shown = [o.replace("=", " ") if o.startswith("--") else o for o in options]
    return ", ".join(f"`{part}`" for part in (method, *shown))


def rival_of(row: Row, rows: list[Row]) -> Row | None:
    """The rival of the same scheme with the smallest divergence."""
    others = [r for r in rows if r["scheme"] == row["scheme"] and r["tool"] != "qkit"]
    return min(others, key=lambda r: r["wikitext2"]["kl"], default=None)


def cell(row: Row, text: str, rival: Row | None) -> str:
    """Perplexity, and the difference to the rival where one was measured."""
    found = row[text].get(f"against {rival['run']}") if rival else None
    return f"{row[text]['perplexity']:.2f}" + (f", {interval(found, 2)}" if found else "")


def comparison(*schemes: str) -> str:
    """All runs of these schemes, the largest divergence first."""
    everything = report("comparison/tiny-llama")
    rows = []
    for scheme in schemes:
        runs = [r for r in everything if r["scheme"] == scheme]
        for run in sorted(runs, key=lambda r: -r["wikitext2"]["kl"] - r["heldout"]["kl"]):
            rival = rival_of(run, everything)
            rows.append(
                {
                    "scheme": f"`{scheme}`" + (", g64" if scheme == "w2a16" else ""),
                    "method": named(run["kind"]),
                    "parts": run["slices"],
                    "MB": mb(run["bytes"]),
                    "s": f"{run['seconds']:.0f}",
                    "GB": f"{run['memory'] / 1e9:.2f}",
                    "WikiText-2": cell(run, "wikitext2", rival),
                    "heldout": cell(run, "heldout", rival),
                    "KL, WikiText-2": f"{run['wikitext2']['kl']:.4f}",
                    "KL, heldout": f"{run['heldout']['kl']:.4f}",
                }
            )
    return markdown(rows)


def summary() -> str:
    """One row per scheme that a rival was measured for: the default, and the best rival."""
    rows, found = [], report("comparison/levels-smollm2")
    for x in found:
        rivals = [r for r in found if r["scheme"] == x["scheme"] and r["level"] not in LEVELS]
        if not rivals or x["level"] != DEFAULT:
            continue
        rival = min(rivals, key=lambda r: r["wikitext2"]["kl"])
        row = {"scheme": shown_scheme(x["scheme"]), "size, MB": mb(x["bytes"]), "qkit": f"`--quality {x['level']}`"}
        row |= {"perplexity, KL, on chat": figures(x), "best other tool": rival["level"], "its figures": figures(rival)}
        rows.append(row)
    return markdown(rows) + f"\n\nThe original model has a perplexity of {found[0]['wikitext2']['original']:.2f}."


def shown_scheme(scheme: str) -> str:
    """A scheme of reports/comparison/levels.py: w3a16:64 has groups of 64."""
    name, _, width = scheme.partition(":")
    return f"`{name}`" + (f", g{width}" if width else "")


def figures(run: Row) -> str:
    """Perplexity and divergence on WikiText-2, and divergence on chat where it was measured."""
    kinds = [run["wikitext2"]["kl"], *([run["chat"]["kl"]] if "chat" in run else [])]
    return ", ".join([f"{run['wikitext2']['perplexity']:.2f}", *(f"{kl:.3g}" for kl in kinds)])


def choices() -> str:
    """What to use for what, with cost and quality."""
    wanted = [
        ("a first try, no calibration", "w4a16", "rtn", "--method rtn"),
        (
            "a good 4-bit file, quickly",
            "w4a16",
            BEST[0],
            "--method gptq --option signed=true --option sweeps=4 --option compensate=0.5",
        ),
        ("a good 4-bit file, without knowing the model", "w4a16", "auto", "--method auto"),
        (
            "the best 4-bit file",
            "w4a16",
            BEST[1],
            "--method signround {written} --option {weigh}=true",
        ),
        ("the best 3-bit file", "w3a16", BEST[1], "the same"),
        ("the best 2-bit file", "w2a16", BEST[1], "the same, with --group-size 64"),
        ("INT8 weights and inputs", "w8a8", "auto", "--method auto"),
        ("INT4 weights, INT8 inputs", "w4a8", "auto", "--method auto"),
        (
            "NVFP4 that vLLM loads",
            "nvfp4",
            "gptq+signround",
            "--method gptq+signround",
        ),
        (
            "the best NVFP4, for `qkit.load`",
            "nvfp4",
            "residual+auto share=0.5",
            "--method residual+auto --option share=0.5",
        ),
    ]
    names = {"written": NEW_NAMES.get("--written", "--written") + " 192"}
    names["weigh"] = NEW_NAMES.get("weigh", "weigh")
    everything = {(r["scheme"], r["kind"]): r for r in report("comparison/tiny-llama")}
    rows = []
    for need, scheme, kind, arguments in wanted:
        run = everything[scheme, f"qkit {kind}"]
        line = arguments.format(**names)
        rows.append(
            {
                "you want": need,
                "scheme": f"`{scheme}`",
                "method": line if line.startswith("the same") else f"`{line}`",
                "time": f"{run['seconds']:.0f} s",
                "memory": f"{run['memory'] / 1e9:.2f} GB",
                "file": f"{mb(run['bytes'])} MB",
                "perplexity": f"{run['wikitext2']['perplexity']:.2f}",
                "KL": f"{run['wikitext2']['kl']:.4f}",
            }
        )
    return markdown(rows)


def outliers_rivals() -> str:
    """The model with outliers beside rivals."""
    order = {"w4a16": 0, "w3a16": 1, "nvfp4": 2, "w8a8": 3}
    runs = sorted(report("comparison/outliers"), key=lambda r: (order[r["scheme"]], -r["wikitext2"]["kl"]))
    return markdown(
        [
            {
                "scheme": f"`{r['scheme']}`",
                "method": named(r["kind"]),
                "MB": mb(r["bytes"]),
                "WikiText-2": f"{r['wikitext2']['perplexity']:.2f}",
                "heldout": f"{r['heldout']['perplexity']:.2f}",
                "KL, WikiText-2": f"{r['wikitext2']['kl']:.4f}",
            }
            for r in runs
        ]
    )


def outliers_methods() -> str:
    """The model with outliers by scheme and method."""
    rows = report("outliers/tiny-llama-outliers")["rows"]
    methods = ("rtn", "gptq", "smoothquant", "awq", "rotate", "requant+rtn", "requant+gptq")
    found = {(r["scheme"], r["method"]): f"{r['perplexity']:.2f}" for r in rows}
    return markdown(
        [
            {"scheme": f"`{s}`", **{m: found.get((s, m), "") for m in methods}}
            for s in ("w8a8", "w4a8", "w4a16", "w3a16")
        ]
    )


def quality() -> str:
    """Perplexities of a dozen of schemes, by calibration text."""
    embedded = report("quality/tiny-llama-embedded")["rows"]
    return markdown(
        [
            {
                "scheme": f"`{row['scheme']}`" + (f", g{row['group']}" if row["group"] else ""),
                "method": row["method"],
                "qkit": f"{row['perplexity']:.2f}",
                "qkit, embedded text": f"{other['perplexity']:.2f}",
                "llm-compressor": f"{row['llm-compressor']:.2f}",
                "MB": mb(row["bytes"]),
            }
            for row, other in zip(report("quality/tiny-llama")["rows"], embedded, strict=True)
        ]
    )


def speed() -> str:
    """Time and memory of GPTQ."""
    rows = []
    for suffix, cores in (("", "AVX2"), ("-avx512-bf16", "AVX-512 with bf16, an older version")):
        for model in ("tiny-llama", "llama-1024x12"):
            found = report(f"gptq_speed/{model}{suffix}")
            ours, rival = found["qkit"], found["llm-compressor"]
            rows.append(
                {
                    "model": model,
                    "cores": cores,
                    "qkit": f"{ours['quantize_s']:.1f} s",
                    "llm-compressor": f"{rival['oneshot_s']:.1f} s",
                    "peak memory, qkit": f"{ours['peak_rss_bytes'] / 1e9:.2f} GB",
                    "peak memory, llm-compressor": f"{rival['peak_rss_before_save_bytes'] / 1e9:.2f} GB",
                }
            )
    return markdown(rows)


def budgets(name: str) -> str:
    """Perplexities of plans by mean bits, on both texts."""
    columns = {
        "uniform, interpolated": "uniform, interpolated",
        "random, mean": "random, mean of 10",
        "weight": "by weight error",
        "kl": "by `kl`",
        "refined": "`kl`, 40 plans measured",
    }
    found = {(b["bits"], b["text"]): b["perplexity"] for b in report(f"allocation/{name}")["budgets"]}
    return markdown(
        [
            {
                "mean bits": bits,
                **{
                    c: " / ".join(f"{found[bits, t][k]:.2f}" for t in ("wikitext2", "heldout"))
                    for k, c in columns.items()
                },
            }
            for bits in dict.fromkeys(bits for bits, _ in found)
        ]
    )


def requant() -> str:
    """ReQuant beside what else the bytes could buy."""
    rows = {r["row"]: r for r in report("requant/tiny-llama")}
    columns = {
        "by itself": "{}",
        "with `requant`": "requant+{}",
        "groups of 64": "{} g64",
        "int3 and int4 mixed": "{} int3/int4",
    }
    table = []
    for method in ("rtn", "awq", "gptq"):
        row: Row = {"method": method}
        for column, name in columns.items():
            found = rows.get(name.format(method))
            size = mb(rows[name.format("rtn")]["bytes"])
            texts = [f"{found['perplexity'][t]:.2f}" for t in ("wikitext2", "heldout")] if found else []
            row[f"{column}, {size} MB"] = " / ".join(texts)
        table.append(row)
    return markdown(table)


def requant_differences() -> str:
    """ReQuant less int3 and int4 mixed in no more bytes."""
    rows = {r["row"]: r for r in report("requant/tiny-llama")}
    table = []
    for method in ("rtn", "gptq"):
        found = rows[f"requant+{method}"][f"against {method} int3/int4"]
        shown = {"WikiText-2": interval(found["wikitext2"], 2), "held-out text": interval(found["heldout"], 2)}
        table.append({"method": f"`{method}`", **shown})
    return markdown(table)


def rank() -> str:
    """Low-rank branches, outliers and smaller groups."""
    return markdown(
        [
            {
                "run": f"`{r['run']}`" if "mixed" not in r["run"] else r["run"],
                "file, MB": f"{r['file_mb']:.2f}",
                "change of perplexity, %": interval(r["change_percent"], 2),
                "KL, nats": f"{r['kl']:.4f}",
            }
            for r in report("rank/tiny-llama")["rows"]
        ]
    )


def levels(name: str) -> str:
    """The levels of --quality beside each other, and rivals where one ran. A ratio to the rival is to the best of a scheme."""
    rows, found = [], report(f"comparison/levels-{name}")
    schemes = list(dict.fromkeys(x["scheme"] for x in found))
    rivals = {scheme: [x for x in found if x["scheme"] == scheme and x["level"] not in LEVELS] for scheme in schemes}
    order = [*LEVELS, *dict.fromkeys(x["level"] for x in found if x["level"] not in LEVELS)]
    texts = {"": "wikitext2", " on chat": "chat"} if any("chat" in x for x in found) else {"": "wikitext2"}
    for x in sorted(found, key=lambda x: (schemes.index(x["scheme"]), order.index(x["level"]))):
        ours = x["level"] in LEVELS
        row = {"scheme": shown_scheme(x["scheme"]), "made with": f"`--quality {x['level']}`" if ours else x["level"]}
        # AutoRound's is measured as 16-bit numbers
        row["size, MB"] = "" if x["level"].startswith("AutoRound") else mb(x["bytes"])
        row["perplexity"] = f"{x['wikitext2']['perplexity']:.2f}"
        row |= {f"KL{where}": f"{x[text]['kl']:.3g}" if text in x else "" for where, text in texts.items()}
        below = next((x["wikitext2"][f"to {other}"] for other in LEVELS if f"to {other}" in x["wikitext2"]), None)
        row["KL / level below"] = interval(below, 2, signed=False) if below else ""
        for where, text in texts.items():
            measured = [r for r in rivals[x["scheme"]] if ours and f"to {r['level']}" in x.get(text, {})]
            best = min(measured, key=lambda r: r[text]["kl"], default=None)
            ratio = best and x[text][f"to {best['level']}"]
            if any(rivals.values()):
                row[f"KL / rival{where}"] = interval(ratio, 2, signed=False) if ratio else ""
        seconds = x.get("processor", x.get("seconds"))
        rows.append({**row, "seconds": f"{seconds:.0f}"} if seconds is not None else row)
    return markdown(rows)


def durations(name: str) -> str:
    """The estimates of ``qkit plan`` beside what runs took."""
    return markdown(
        [
            {
                "scheme": f"`{x['scheme']}`",
                "quality": x["quality"],
                "estimated, s": f"{x['estimated']:.0f}",
                "measured, s": f"{x['measured']:.0f}",
            }
            for x in report(f"duration/{name}")
        ]
    )


TABLES = {
    "summary": summary,
    "choices": choices,
    "comparison-weights": lambda: comparison("w4a16", "w3a16", "w2a16"),
    "comparison-inputs": lambda: comparison("nvfp4", "w4a8", "w8a8"),
    "outliers-rivals": outliers_rivals,
    "outliers-methods": outliers_methods,
    "quality": quality,
    "speed": speed,
    "budgets-weights": lambda: budgets("tiny-llama"),
    "budgets-inputs": lambda: budgets("tiny-llama-nvfp4"),
    "requant": requant,
    "requant-differences": requant_differences,
    "rank": rank,
    "levels-smollm2": lambda: levels("smollm2"),
    "levels-smollm2-ft": lambda: levels("smollm2-ft"),
    "levels-tiny-llama": lambda: levels("tiny-llama"),
    "durations": lambda: durations("tiny-llama"),
}
