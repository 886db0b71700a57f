"""The text of a plan for hardware that is only described."""

from flax_transformer.experiment.hardware_plan import GIB, HardwarePlan, ProgramPlan
from flax_transformer.experiment.plan_search import Ranked
from flax_transformer.parallel.exchanges import Exchange

NOTE = (
    "Times are bounds: bytes / bandwidth, products / peak and a latency for each kernel, and what the links\n"
    "carry. They are uncalibrated: nothing has been measured on this hardware. A real step takes longer."
)
# Exchanges with fewer bytes than this share of all are summed up in one line.
SMALL_SHARE = 0.02


def describe_plan(plan: HardwarePlan) -> str:
    """Returns the text of a plan: hardware, model, batch, and what each program needs."""
    config, mesh, shape = plan.config, plan.config.mesh, plan.shape
    parts = config.batching.gradient_accumulation_steps
    lines = [
        f"hardware   {plan.topology}: {plan.num_devices:,} x {plan.device_kind}; mesh data {mesh.data} x fsdp "
        f"{mesh.fsdp} x tensor {mesh.tensor}",
        f"model      {config.model.description}: {plan.num_parameters:,} parameters, products in "
        f"{config.model.compute_dtype}",
        f"batch      {shape.rows:,} rows of {shape.source_length} + {shape.target_length} tokens"
        + (f" in {parts} micro-batches" if parts > 1 else ""),
    ]
    for program in (plan.train, plan.search):
        if program is not None:
            lines += ["", *_describe_program(plan, program)]
    note = [] if plan.train.cost is None else ["", NOTE]
    return "\n".join([*lines, *note, "", _verdict(plan)])


def _describe_program(plan: HardwarePlan, program: ProgramPlan) -> list[str]:
    what = {"train step": "train step", "search": f"step of the search, {program.tokens:,} sentences"}[program.name]
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in program.memory.items() if size)
    limit = "" if plan.available is None else f" of {plan.available / GIB:.1f}"
    lines = [f"{what}, on each device", f"  memory     {program.needed / GIB:.2f}{limit} GiB: {parts}"]
    if program.cost is None or program.seconds is None:
        return [*lines, "  time       not known"]
    cost, (hidden, exposed) = program.cost, program.seconds
    share = program.flops_utilization or 0.0
    speed, shares = program.tokens / exposed, share * cost.seconds / exposed
    times, speeds = f"{exposed * 1e3:.3g} ms", f"{speed:,.0f} target tokens/s"
    if program.exchanges:
        times = f"{hidden * 1e3:.3g} ms if exchanges are hidden, {times} if not; kernels {cost.seconds * 1e3:.3g} ms"
        speeds = f"{speeds} ({program.tokens / hidden:,.0f} with hidden exchanges)"
    lines += [
        f"  work       {cost.flops / 1e12:.3g} TFLOP of products, {cost.bytes / 1e9:.2f} GB moved, "
        f"{cost.launches:,} kernels",
        f"  time       {times}",
        f"  speed      {speeds} on all devices, padding included; {shares:.1%} of the peak",
    ]
    return lines + [f"  exchange   {line}" for line in _describe_exchanges(program.exchanges)]


def _describe_exchanges(exchanges: list[Exchange]) -> list[str]:
    total = sum(exchange.bytes for exchange in exchanges)
    large = [exchange for exchange in exchanges if exchange.bytes >= SMALL_SHARE * total]
    lines = [
        f"{e.kind} along {' + '.join(e.axes) or 'no axis'}: {e.number:,} times, {e.bytes / 1e6:,.1f} MB, "
        f"{e.seconds * 1e3:.3g} ms"
        for e in large
    ]
    if small := [exchange for exchange in exchanges if exchange not in large]:
        lines.append(f"others: {sum(e.number for e in small):,} times, {sum(e.bytes for e in small) / 1e6:,.2f} MB")
    return lines or ["none"]


def _verdict(plan: HardwarePlan) -> str:
    if plan.available is None:
        return "It is not known how much memory a device has."
    if plan.too_large:
        return "does not fit"
    fullest = max(p.needed for p in (plan.train, plan.search) if p is not None)
    return f"fits: the larger program takes {fullest / plan.available:.0%} of the memory of a device"


def describe_ranking(ranking: list[Ranked]) -> str:
    """Returns a table of choices of mesh, batch and rematerialisation, the fastest first."""
    rows = [("data", "fsdp", "tensor", "tokens_per_batch", "rematerialize", "GiB", "ms", "target tokens/s", "of peak")]
    for ranked in ranking:
        plan, config = ranked.plan, ranked.config
        assert plan is not None, "what is ranked was compiled"
        seconds = plan.train.seconds[1] if plan.train.seconds else float("nan")
        share = (plan.train.flops_utilization or 0.0) * (plan.train.cost.seconds / seconds if plan.train.cost else 0.0)
        rows.append(
            (
                str(config.mesh.data),
                str(config.mesh.fsdp),
                str(config.mesh.tensor),
                f"{config.batching.tokens_per_batch:,}",
                str(getattr(config.model, "rematerialize", False)).lower(),
                f"{plan.train.needed / GIB:.1f}",
                f"{seconds * 1e3:.3g}",
                f"{ranked.tokens_per_second:,.0f}" if ranked.tokens_per_second else "does not fit",
                f"{share:.1%}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    best = ranking[0].config
    flags = (
        f"--mesh.data {best.mesh.data} --mesh.fsdp {best.mesh.fsdp} --mesh.tensor {best.mesh.tensor} "
        f"--batching.tokens-per-batch {best.batching.tokens_per_batch} "
        f"--batching.row-multiple {best.batching.row_multiple}"
    )
    if hasattr(best.model, "rematerialize"):
        flags += " --model.rematerialize" if best.model.rematerialize else " --model.no-rematerialize"
    found = f"The best: {flags}" if ranking[0].tokens_per_second else "None of these fits. Lower tokens_per_batch."
    return f"{table}\n\n{found}\nA larger batch changes the training, not only its speed.\n{NOTE}"
