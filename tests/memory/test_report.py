"""The report's three forms agree with the ledger, whatever the run was like."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.memory import chart
from lowbit.memory.components import COMPONENTS, DIFFUSION_MODEL, OTHER, TEXT_ENCODER, VAE, size_text
from lowbit.memory.ledger import Release, Run, Sample
from lowbit.memory.report import RunReport

GIB = 1 << 30
NAME = "cuda:0 (a test)"


def sample(seconds, node="3", step=0, steps=0, peak=None, reserved=None, **components) -> Sample:
    sizes = {name.replace("_", " "): int(value * GIB) for name, value in components.items()}
    allocated = sum(sizes.values())
    return Sample(
        seconds=seconds,
        phase="sampling" if steps else "node",
        node=node,
        step=step,
        steps=steps,
        allocated=allocated,
        reserved=int((reserved or allocated / GIB) * GIB),
        peak=int((peak or allocated / GIB) * GIB),
        free=2 * GIB,
        outside=3 * GIB if node == "3" else 0,
        host_resident=20 * GIB,
        host_pinned=GIB,
        components=sizes,
    )


def run_of(*samples, **facts) -> Run:
    run = Run("prompt", 0.0, nodes={"2": "CLIPTextEncode", "3": "KSampler"})
    for item in samples:
        run.add(item)
    for name, value in facts.items():
        setattr(run, name, value)
    return run


RUN = run_of(
    sample(0.0, node="2", other=0.5),
    sample(2.0, node="2", text_encoder=6.0, other=0.5, peak=7.0),
    sample(2.5, node="3", text_encoder=6.0, other=0.5),
    sample(5.0, node="3", step=1, steps=2, diffusion_model=10.0, other=1.0, peak=13.25, reserved=14.0),
    sample(8.0, node="3", step=2, steps=2, diffusion_model=10.0, other=1.0, peak=12.0, reserved=14.0),
    limit=16 * GIB,
    releases=[Release(2.6, "3", (TEXT_ENCODER,), "room for QwenImage", 6 * GIB)],
    notes=["Out of memory in step 1 of 2."],
    step_seconds=[2.5, 3.0],
    stepping_seconds=5.5,
    measuring_steps_seconds=0.011,
)


def test_the_text_has_every_number():
    text = RunReport(RUN, NAME, 24 * GIB).text
    for part in (
        "cuda:0 (a test), 24.00 GiB in all, limit 16.00 GiB",
        "Peak 13.25 GiB in step 1 of 2; reserved up to 14.00 GiB, 3.00 GiB of it dynamic VRAM's pages; at least 2.00 GiB free",
        "8.0 s; 2 steps, 3.00 s a step, measuring took 0.20% of a step",
        "up to 20.00 GiB resident, 1.00 GiB of it pinned",
        "2.6 s  text encoder: 6.00 GiB freed (room for QwenImage)",
        "Out of memory in step 1 of 2.",
    ):
        assert part in text
    assert [line.split() for line in text.splitlines() if line.startswith("diffusion")] == [
        ["diffusion", "model", "10.00", "GiB", "10.00", "GiB"]
    ]
    assert not any(line.startswith("VAE") for line in text.splitlines()), "what was never there has no row"


def test_a_nodes_peak_leaves_out_what_happened_before_it():
    rows = {line.split()[0]: line.split()[-2:] for line in RunReport(RUN, NAME, GIB).text.splitlines() if "(" in line}
    assert rows["CLIPTextEncode"] == ["7.00", "GiB"]
    assert rows["KSampler"] == ["13.25", "GiB"]
    late = run_of(sample(0, node="2", other=1), sample(1, node="3", other=1, peak=9.0), sample(2, node="3", other=2))
    nodes = {entry["id"]: entry["peak_bytes"] for entry in RunReport(late, NAME, GIB).data["nodes"]}
    assert nodes == {"2": GIB, "3": 2 * GIB}


def test_the_data_is_json_and_complete():
    data = json.loads(json.dumps(RunReport(RUN, NAME, 24 * GIB).data))
    assert data["peak_bytes"] == 13.25 * GIB
    assert data["limit_bytes"] == 16 * GIB
    assert data["seconds_per_step"] == 3.0
    assert len(data["samples"]) == 5
    assert data["samples"][3]["components"] == {DIFFUSION_MODEL: 10 * GIB, OTHER: GIB}
    assert data["releases"][0]["names"] == [TEXT_ENCODER]


def colours(picture) -> set[str]:
    return {f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b) in picture.getcolors(1 << 24)}


def test_the_chart_shows_what_there_was_and_nothing_else():
    picture = RunReport(RUN, NAME, GIB).chart
    assert picture.size == (1600, 900)
    shown = colours(picture)
    assert {chart._COLOURS[name] for name in (DIFFUSION_MODEL, TEXT_ENCODER, OTHER)} <= shown
    assert chart._COLOURS[VAE] not in shown
    assert {chart._LIMIT, chart._PEAK} <= shown
    assert chart._LIMIT not in colours(RunReport(run_of(*RUN.samples), NAME, GIB).chart)


def test_remarks_are_written_beside_the_chart_as_far_as_they_fit():
    quiet = run_of(*RUN.samples)
    noted = run_of(*RUN.samples, notes=["Out of memory in step 1 of 2."])
    flooded = run_of(*RUN.samples, notes=["Out of memory in step 1 of 2." * 4] * 100)

    def inked(run) -> int:
        corner = RunReport(run, NAME, GIB).chart.crop((chart._RIGHT + 20, 0, chart.WIDTH, chart.HEIGHT))
        return sum(count for count, colour in corner.getcolors(1 << 24) if colour != (15, 18, 24))

    assert inked(quiet) < inked(noted) < inked(flooded)


def test_areas_are_as_high_as_their_bytes():
    full = run_of(sample(0.0, diffusion_model=4.0), sample(10.0, diffusion_model=4.0))
    half = run_of(sample(0.0, diffusion_model=2.0, peak=4.0), sample(10.0, diffusion_model=2.0, peak=4.0))

    def height(run) -> int:
        picture = RunReport(run, NAME, GIB).chart
        middle = (chart._LEFT + chart._RIGHT) // 2
        blue = tuple(int(chart._COLOURS[DIFFUSION_MODEL][index : index + 2], 16) for index in (1, 3, 5))
        return sum(picture.getpixel((middle, y)) == blue for y in range(chart._TOP, chart._BOTTOM))

    assert height(full) == pytest.approx(2 * height(half), abs=4)


def test_areas_stand_on_each_other_in_the_order_of_the_components():
    both = {"diffusion_model": 3.0, "text_encoder": 1.0}
    picture = RunReport(run_of(sample(0.0, **both), sample(10.0, **both)), NAME, GIB).chart
    column = [picture.getpixel(((chart._LEFT + chart._RIGHT) // 2, y)) for y in range(chart._TOP, chart._BOTTOM)]
    shown = {}
    for name in (DIFFUSION_MODEL, TEXT_ENCODER):
        colour = tuple(int(chart._COLOURS[name][index : index + 2], 16) for index in (1, 3, 5))
        shown[name] = [index for index, pixel in enumerate(column) if pixel == colour]
    assert max(shown[TEXT_ENCODER]) < min(shown[DIFFUSION_MODEL])
    assert len(shown[DIFFUSION_MODEL]) == pytest.approx(3 * len(shown[TEXT_ENCODER]), rel=0.1)


@given(
    st.lists(
        st.tuples(st.floats(0, 100), st.integers(0, 2), *[st.floats(0, 8) for _ in COMPONENTS]),
        max_size=12,
    ),
    st.sampled_from([None, 1, GIB, 100 * GIB]),
)
@settings(max_examples=15, deadline=None)
def test_any_run_has_a_report(rows, limit):
    items = []
    for seconds, node, *sizes in sorted(rows):
        named = {name.replace(" ", "_"): size for name, size in zip(COMPONENTS, sizes, strict=True)}
        items.append(sample(seconds, node=str(node), step=node, steps=2 if node else 0, **named))
    report = RunReport(run_of(*items, limit=limit), NAME, GIB)
    assert report.chart.size == (1600, 900)
    assert report.text
    json.dumps(report.data, allow_nan=False)


def test_an_empty_run_says_what_to_do():
    report = RunReport(run_of(), NAME, GIB)
    assert "put a Memory Manager (Lowbit) in front of the sampler" in report.text
    assert report.data["peak_bytes"] == 0


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0.0 MiB"), (5 << 20, "5.0 MiB"), (GIB // 2, "0.50 GiB"), (100 * GIB, "100.00 GiB")]
)
def test_sizes_are_written_for_people(nbytes, text):
    assert size_text(nbytes) == text


@pytest.mark.parametrize("most", [0.003, 0.4, 1, 7, 16, 24, 99, 1234])
def test_ticks_are_round_and_within(most):
    ticks = chart._ticks(most, 6)
    assert ticks[0] == 0
    assert ticks[-1] <= most
    assert 3 <= len(ticks) <= 8
    step = ticks[1]
    assert float(f"{step:.0e}") == pytest.approx(step)
