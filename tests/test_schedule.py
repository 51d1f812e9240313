"""Step plans: phases, batch ramp, warm-up, decay."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.config import PretrainConfig, resolve
from trinity.optim.schedule import StepPlan

sizes = st.integers(1, 3000)


@given(
    phases=st.lists(sizes, min_size=1, max_size=4),
    ramp=st.lists(st.tuples(st.integers(1, 8000), st.integers(1, 9)), max_size=3, unique_by=lambda b: b[0]),
    first=st.integers(1, 9),
    seq_len=st.integers(1, 64),
)
@settings(max_examples=100)
def test_plan_equals_walking_step_by_step(phases, ramp, first, seq_len) -> None:
    batch = [(0, first), *sorted(ramp)]
    stage = PretrainConfig.model_validate(
        {
            "seq_len": seq_len,
            "phases": [{"name": f"p{i}", "tokens": t, "weights": {"a": 1}} for i, t in enumerate(phases)],
            "batch": [{"from_tokens": t, "rows": r} for t, r in batch],
        }
    )
    plan = StepPlan.pretrain(stage)
    tokens, steps = 0, 0
    while tokens < sum(phases):
        index = next(i for i in range(len(phases)) if tokens < sum(phases[: i + 1]))
        rows = [r for start, r in batch if start <= tokens][-1]
        planned = plan[steps]
        assert (planned.step, planned.phase, planned.rows, planned.tokens_before) == (steps, f"p{index}", rows, tokens)
        tokens += rows * seq_len
        steps += 1
    assert len(plan) == steps
    with pytest.raises(IndexError):
        plan[steps]


def test_large_recipe() -> None:
    plan = StepPlan.pretrain(resolve("large")[0].pretrain)
    assert plan[0].lr_scale == pytest.approx(1 / 2000)
    assert plan[1999].lr_scale == 1.0
    assert plan[0].rows == 12288
    late = plan[int(4.95e12 / (12288 * 8192))]
    assert late.rows == 16384
    assert late.lr_scale == 1.0
    last = plan[len(plan) - 1]
    assert last.lr_scale == pytest.approx(0.1, abs=1e-3)
    assert last.phase == "quality"
    assert last.tokens_before < 20e12 <= last.tokens_before + last.rows * 8192


def test_constant_plan_and_cosine() -> None:
    stage = resolve("demo", overrides=["rl.lr_scale=1.0", "rl.final_lr_scale=0.0"])[0].rl
    plan = StepPlan.constant(stage, "rl", steps=10, rows=4)
    assert len(plan) == 10
    scales = [p.lr_scale for p in plan]
    assert scales == sorted(scales, reverse=True)
    assert scales[5] == pytest.approx(0.5)
