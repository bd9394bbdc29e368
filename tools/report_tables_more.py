"""Tables of measured figures of KV caches, vision-language models, videos, kernels and reliability."""

from __future__ import annotations

from typing import Any

from markdown_table import Row, markdown
from report_tables import interval, mb, report

LLAMA_MATRIX = {"plain": "without a matrix", "imatrix": "with its importance matrix"}
CACHES = {
    "int8": "`int8`",
    "fp8": "`fp8`, scale 1",
    "hierarchical8": "`hierarchical8`",
    "kivi4": "`kivi4`",
    "xquant4": "`xquant4`",
    "xquant-cl4": "`xquant-cl4`",
    "xquant-cl3": "`xquant-cl3`",
    "xquant-cl2": "`xquant-cl2`",
    "pm-kvq:4": "`pm-kvq:4`",
    "rotate4": "`rotate4`",
    "int4": "`int4`",
    "int3": "`int3`",
    "kivi2": "`kivi2`",
    "xquant2": "`xquant2`",
    "pm-kvq:2": "`pm-kvq:2`",
    "int2": "`int2`",
    "rotate2": "`rotate2`",
    "direct 2": "layout of `pm-kvq:2`, 2 bits from the first token",
    "pm-kvq:4-2": "`pm-kvq:4-2`, between the two, by sensitivity",
    "equal budgets": "the same memory, equal for all layers",
    "least sensitive first": "the same memory, least sensitive layers first",
}
VIDEOS = {
    "W8A8": "W8A8, rounded",
    "W4A8": "W4A8, rounded",
    "W4A8, SmoothQuant": "W4A8, SmoothQuant, rounded",
    "W4A8, Hadamard": "W4A8, Hadamard, rounded",
    "W4A8, SmoothQuant, Hadamard": "W4A8, SmoothQuant and Hadamard, rounded",
    "W4A8, GPTQ": "W4A8",
    "NVFP4 weights, INT8 inputs": "NVFP4 weights, INT8 inputs",
    "NVFP4": "NVFP4",
    "static, 5 bits": "`6bit`, kind=static, width=5",
    "dmpq, 5 bits": "`6bit`, width=5",
    "dmpq, weighed, 5 bits": "`6bit`, width=5, weigh=true",
    "static, 6 bits": "`6bit`, kind=static, width=6",
    "static, weighed, 6 bits": "`6bit`, kind=static, width=6, weigh=true",
    "decoupled, 6 bits": "`6bit`, kind=decoupled, width=6",
    "dmpq, 6 bits": "`6bit`, width=6",
    "dmpq, weighed, 6 bits": "`6bit`, width=6, weigh=true",
    "dmpq, 6 bits, Hadamard": "`6bit`, width=6, Hadamard",
    "static, 7 bits": "`6bit`, kind=static, width=7",
    "dmpq, 7 bits": "`6bit`, width=7",
    "dmpq, 6 bits, cache": "`6bit`, width=6, skips=0.25",
    "dmpq, 6 bits, schedule": "`6bit`, width=6, skips=0.25, cache=schedule",
    "INT8 inputs, schedule": "`6bit`, width=8, skips=0.25, cache=schedule",
}


def caches() -> str:
    """What packed caches cost, by decoding two texts."""
    heldout = report("kvcache/tiny-llama-long")["texts"]["heldout"]
    other = report("kvcache/tiny-llama-long-wikitext2")["texts"]["wikitext2"]

    def change(found: Row) -> str:
        low, high = found["change_ci"]
        return f"{found['change_percent']:+.2f} % [{low:+.2f}, {high:+.2f}]"

    return markdown(
        [
            {
                "cache": label,
                "of 16 bits": f"{heldout[name]['share']:.3f}",
                "perplexity": f"{heldout[name]['perplexity']:.2f}",
                "change (95 % interval)": change(heldout[name]),
                "WikiText-2": f"{other[name]['perplexity']:.2f}",
                "change": change(other[name]),
                "same greedy": f"{heldout[name]['same_greedy']:.1f} of 32",
            }
            for name, label in CACHES.items()
        ]
    )


def retrieval() -> str:
    """Needles in 512 tokens."""
    rows = []
    for cache, asked in report("kvcache/retrieval")["caches"].items():
        found = {a["depth"]: a for a in asked if a["task"] == "needle" and a["length"] == 512}
        gains = {
            f"gain at depth {d:g}": interval([found[d]["gain"], *found[d]["gain_ci"]], 2) for d in (0.5, 0.75, 1.0)
        }
        label = "plain" if cache == "none" else f"`{cache}`"
        rows.append({"cache": label, "of 16 bits": f"{found[1.0]['share']:.3f}", **gains})
    return markdown(rows)


def serving() -> str:
    """What vLLM's caches cost a packed model at each context."""
    contexts = report("kvcache/serving")["files"]["fp8"]["contexts"]
    names = [c["dtype"] for c in next(iter(contexts.values()))["caches"] if c["dtype"] != "auto"]
    columns = ["of 16 bits", *(f"KL at {int(context):,} tokens" for context in contexts)]
    rows: dict[str, Row] = {name: {"cache": f"`{name}`", **dict.fromkeys(columns, "")} for name in names}
    for context, found in contexts.items():
        for cost in found["caches"]:
            if cost["dtype"] in rows and cost["kl"] is not None:
                share = f"{cost['bytes'] / found['plain_bytes']:.3f}"
                rows[cost["dtype"]] |= {"of 16 bits": share, f"KL at {int(context):,} tokens": f"{cost['kl']:.4f}"}
    return markdown(list(rows.values()))


def lengths() -> str:
    """MB of caches against the length of the context."""
    found = report("kvcache/length")["lengths"]
    names = ("none", "int8", "xquant4", "pm-kvq:2", "kivi2", "int2")
    return markdown(
        [
            {
                "tokens": f"{int(tokens):,}",
                **{"plain" if n == "none" else f"`{n}`": mb(found[tokens][n]["bytes"]) for n in names},
            }
            for tokens in ("256", "1024", "4096")
        ]
    )


def vision() -> str:
    """Right answers and divergence of the small vision-language model."""
    settings = {"W4A8": "W4A8", "W3A16 g64": "W3, g64", "W2A16 g32": "W2, g32", "W2A16 g64": "W2, g64"}
    found = {(r["setting"], r["method"]): r for r in report("vlm/tiny-vlm")["rows"]}
    methods = ("rtn", "awq (text)", "awq", "gptq", "mbq-mse", "mbq", "mbq+gptq", "signround", "auto")
    rows = []
    for method in methods:
        row: Row = {"method": "awq, text alone" if method == "awq (text)" else method}
        for setting, label in settings.items():
            figures = found[setting, method]
            row[label] = f"{figures['accuracy'][0]:.1f} / {figures['kl'][0]:.4f}"
        rows.append(row)
    return markdown(rows)


def videos() -> str:
    """The small video model in all schemes, against samples of the original."""
    found = {r["run"]: r for r in report("video/tiny-video")["rows"]}
    rows = []
    for run, label in VIDEOS.items():
        r = found[run]
        whole = {"NVFP4": "4"}.get(run, "8")
        rows.append(
            {
                "scheme": label,
                "bits of inputs": f"{r['width'][0]:.2f}" if r.get("width") else whole,
                "skipped": f"{100 * r['skipped'][0]:.0f} %" if r.get("skipped") and r["skipped"][0] else "",
                "error of latents": interval(r["latent_error"], 3, signed=False),
                "PSNR, dB": f"{r['psnr'][0]:.1f}",
                "recognised, change in points": interval(r["recognised_change"], 1),
                "flickering, change": f"{r['flickering_change'][0]:+.4f}",
                "reads": f"{r['traffic']:.2f}",
                "operations": f"{r['operations']:.3f}",
            }
        )
    return markdown(rows)


def vision_differences() -> str:
    """Paired differences of methods on the small vision-language model."""
    settings = {"W4A8": "W4A8", "W3A16 g64": "W3, g64", "W2A16 g32": "W2, g32", "W2A16 g64": "W2, g64"}
    rows = []
    for d in sorted(report("vlm/tiny-vlm")["differences"], key=lambda d: (d["of"], d["against"])):
        names = [n.replace("awq (text)", "awq, text alone") for n in (d["of"], d["against"])]
        row: Row = {"method": names[0], "less": names[1], "setting": settings[d["setting"]]}
        rows.append({**row, "right answers, points": interval(d["accuracy"], 1), "KL": interval(d["kl"], 4)})
    return markdown(rows)


def video_differences() -> str:
    """Paired differences of schemes on the small video model."""
    rows = []
    for pair, d in report("video/tiny-video")["pairs"].items():
        left, right = (VIDEOS.get(n, f"{n}, rounded") for n in pair.split(" - "))
        latents, psnr = interval(d["latent_error"], 3), interval(d["psnr"], 2)
        rows.append({"scheme": left, "less": right, "error of latents": latents, "PSNR, dB": psnr})
    return markdown(rows)


def products() -> str:
    """Times of W4A16 products, weights from memory."""
    found = report("kernels_cpu/avx512-bf16")["products"]
    rows = []
    for threads, measured in found.items():
        for product in measured["products"]:
            cold = {(r["contender"], r["rows"]): 1e3 * r["cold"]["p50"] for r in product["results"] if r["cold"]}
            row: Row = {"weight": f"{product['out']}x{product['in']}", "threads": threads}
            for count in (1, 4, 16, 64, 256):
                ours, dense = cold["qkit", count], cold["dense bf16", count]
                row[f"{count} row" + ("s" if count > 1 else "")] = f"{ours:.2f} ms, {dense / ours:.1f}x"
            rows.append(row)
    return markdown(rows)


def decoding() -> str:
    """Tokens per second of a Llama of 300 million parameters."""
    found = report("kernels_cpu/avx512-bf16")["decode"]
    return markdown(
        [
            {"threads": threads, **{m["name"]: f"{m['tokens_per_second']:.0f} tokens/s" for m in measured["models"]}}
            for threads, measured in found.items()
        ]
    )


def reliability() -> str:
    """Faults that were provoked, and how many of them ended wrongly."""
    ends, fuzz = report("reliability/durability"), report("reliability/fuzz")
    changes = report("reliability/output_changes")
    missed = sum(len(kind["called sound"]) for kind in changes["kinds"].values())
    rows = [
        ("a run killed at a random moment", ends["kills"]["kills"], len(ends["kills"]["wrong"])),
        ("two commands with the same output", ends["races"]["races"], len(ends["races"]["wrong"])),
        ("a full disk", ends["full disks"]["disks"], len(ends["full disks"]["wrong"])),
        ("a mutated input file", fuzz["inputs"], fuzz["failures"]),
        ("one change in an output folder", changes["changes"], missed),
    ]
    return markdown([{"fault": f, "times": f"{n:,}", "ended wrongly": wrong} for f, n, wrong in rows])


EXPERTS = {
    "all": "all 8",
    "REAP": "6, `--prune-experts 0.25` (REAP)",
    "frequency": "6, those with the most tokens",
    "merge": "6 of REAP, with the others merged into them",
    "search": "6, REAP and a search (EEP)",
}


def experts() -> str:
    """Leaving experts out, beside narrower weights."""
    found = report("experts/tiny-moe")
    rows = [
        {
            "experts": EXPERTS[row["experts"]],
            "weights": f"`{row['scheme']}`",
            "MB": mb(row["bytes"]),
            "perplexity": f"{row['perplexity']:.2f}",
            "above the original": f"{100 * (row['perplexity'] / found['reference'] - 1):.1f} %",
        }
        for row in sorted(found["rows"], key=lambda r: (r["scheme"] != "bf16", r["perplexity"]), reverse=True)
    ]
    return markdown(rows)


def engines() -> str:
    """What vLLM and transformers made of packed files, beside the noise of each file."""
    rows: list[Row] = []
    titles = {"vLLM": "vLLM 0.32", "transformers": "transformers 5.24"}
    for name, proofs in sorted(report("engines/proofs").items(), key=lambda entry: entry[0].startswith("SmolLM2")):
        row: Row = {"file": name}
        for engine, title in titles.items():
            proof = proofs.get(engine)
            row |= {title: difference_of(proof, "difference"), f"noise, {title}": difference_of(proof, "noise")}
        if proofs.keys() & titles.keys():
            rows.append(row)
    return markdown(rows)


def difference_of(proof: dict[str, Any] | None, which: str) -> str:
    """The mean of a difference in a proof; empty where there is none."""
    if proof is None or proof["difference"] is not None:
        return "" if proof is None else f"{proof[which]['mean']:.3g}"
    return "refused" if which == "difference" else ""


def mlx() -> str:
    """How far mlx_lm's log-probabilities are from qkit's."""
    rows: list[Row] = [
        {
            "file": name,
            "tokens": row["tokens"],
            "both in float32, mean": f"{row['float32']['mean']:.2g}",
            "largest": f"{row['float32']['largest']:.2g}",
            "both in bfloat16, mean": f"{row['bfloat16']['mean']:.2g}",
            "mlx_lm in bfloat16 and in float32, mean": f"{row['mlx']['mean']:.2g}",
        }
        for name, row in report("convert/mlx").items()
    ]
    return markdown(rows)


def engines_gguf() -> str:
    """What llama.cpp made of GGUF files: each type with both models."""
    proofs = {name: found["llama.cpp"] for name, found in report("engines/proofs").items() if "llama.cpp" in found}
    rows: list[Row] = []
    for kind in dict.fromkeys(name.rpartition(" ")[2] for name in proofs):
        row: Row = {"type": kind}
        for model in ("tiny-llama", "SmolLM2-135M"):
            proof = proofs.get(f"{model} {kind}")
            row |= {model: difference_of(proof, "difference"), f"noise, {model}": difference_of(proof, "noise")}
        rows.append(row)
    return markdown(rows)


def gguf_architectures() -> str:
    """Log-probabilities of GGUF files in llama.cpp beside those of qkit."""
    found = report("gguf/architectures")

    def gap(kind: str, scheme: str, key: str) -> str:
        return f"{found[kind][scheme][key]['mean']:.4f}"

    plain = "same numbers in float32"
    runs = [kind for kind, x in found.items() if all("mean" in x.get(s, {}).get(plain, {}) for s in ("q8_0", "q4_0"))]
    return markdown(
        [
            {
                "model type": kind,
                "q8_0 as it is": gap(kind, "q8_0", "file"),
                "q4_0 as it is": gap(kind, "q4_0", "file"),
                "q8_0, the same numbers in float32": gap(kind, "q8_0", plain),
            }
            for kind in runs
        ]
    )


def gguf_mixed() -> str:
    """Mixed GGUF files of qkit and of llama.cpp at the same bytes."""
    rows: list[Row] = []
    for name, measure in (("tiny-llama", "kl"), ("smollm2", "fisher"), ("smollm2-ft", "fisher")):
        files = report(f"gguf/allocation-{name}")["files"]
        for mine in (f for f in files if f["who"] == "qkit" and f["name"].endswith(f" by {measure}") and f["against"]):
            mix = mine["against"]
            plain, matrix = (next(f for f in files if f["name"] == n) for n in (mix, f"{mix} imatrix"))
            change = [100 * x for x in mine[f"to {mix} imatrix"]["perplexity change"]]
            rows.append(
                {
                    "model": name,
                    "measure": measure,
                    "bytes of": mix,
                    "MB": mb(plain["bytes"]),
                    "KL, llama.cpp": f"{plain['kl'][0]:.4f}",
                    "KL, with its importance matrix": f"{matrix['kl'][0]:.4f}",
                    "KL, qkit": f"{mine['kl'][0]:.4f}",
                    "difference to the latter": interval(mine[f"to {mix} imatrix"]["kl difference"], 4),
                    "perplexity, qkit to the latter (%)": interval(change, 2),
                }
            )
    return markdown(rows)


def gguf_quality() -> str:
    """KL divergence of GGUF files from the original, beside llama.cpp's files of the same types."""
    rows: list[Row] = []
    for model in ("tiny-llama", "smollm2"):
        for x in report(f"gguf/{model}"):
            tool, _, how = x["file"].partition(" ")
            row: Row = {"model": model, "scheme": x["scheme"], "MB": mb(x["bytes"])}
            method, *options = how.split()
            made = f"qkit, {', '.join(f'`{part}`' for part in (method, *options))}"
            row["made by"] = made if tool == "qkit" else f"{tool}, {LLAMA_MATRIX[how]}"
            row |= {"KL": f"{x['kl']:.4f}", "perplexity": f"{x['perplexity']:.2f}"}
            for rival, title in LLAMA_MATRIX.items():
                found = x.get(f"against {rival}")
                row[f"KL / llama.cpp {title}"] = interval(found, 2, signed=False) if found else ""
            rows.append(row)
    return markdown(rows)


TABLES = {
    "gguf-architectures": gguf_architectures,
    "gguf-mixed": gguf_mixed,
    "gguf-quality": gguf_quality,
    "engines": engines,
    "engines-gguf": engines_gguf,
    "mlx": mlx,
    "experts": experts,
    "kv-caches": caches,
    "kv-retrieval": retrieval,
    "kv-lengths": lengths,
    "kv-serving": serving,
    "vision": vision,
    "vision-differences": vision_differences,
    "videos": videos,
    "video-differences": video_differences,
    "products": products,
    "decoding": decoding,
    "reliability": reliability,
}
