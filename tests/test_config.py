"""Configurations: round trips, overrides, and errors that name the key."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from regionspot.config import (
    TrainConfig,
    config_from_dict,
    config_of_run,
    config_to_dict,
    config_to_yaml,
    differences_on_resume,
    flatten,
    load_config,
)
from regionspot.errors import InputError

CONFIGS = Path(__file__).parents[1] / "regionspot" / "configs"
MINIMAL = {"datasets": [{"name": "d", "annotations": "train.json"}]}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_files_load_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert config_from_dict(config_to_dict(config)) == config
    (tmp_path / "copy.yaml").write_text(config_to_yaml(config))
    assert load_config(tmp_path / "copy.yaml") == config


def test_the_defaults_are_the_authors_recipe() -> None:
    """The numbers of spec.md, "Training recipe"."""
    config = config_from_dict(MINIMAL)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.weight_decay, config.batch_size) == (
        2.5e-5,
        1e-4,
        16,
    )
    assert (optimizer.warmup_steps, optimizer.warmup_factor, optimizer.max_grad_norm) == (
        1000,
        0.01,
        1.0,
    )
    assert (optimizer.milestones, optimizer.decay_factor, config.steps) == (
        (350_000, 420_000),
        0.1,
        450_000,
    )
    assert (config.model.num_layers, config.model.feedforward_dim, config.model.dropout) == (
        3,
        2048,
        0.1,
    )


def test_the_full_size_file_is_that_recipe_and_its_augmentation() -> None:
    full = flatten(load_config(CONFIGS / "regionspot_bb_stage1.yaml"))
    default = flatten(config_from_dict(MINIMAL))
    recipe = [key for key in default if key.startswith(("optimizer.", "steps", "batch_size"))]
    assert {key: full[key] for key in recipe} == {key: default[key] for key in recipe}
    assert full["augmentation.flip_probability"] == full["augmentation.crop_probability"] == 0.5
    assert full["augmentation.shortest_side_before_crop"] == (400, 500, 600)
    assert full["augmentation.crop_size"] == (384, 600)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("steps=12", "steps", 12),
        # YAML alone would say: a string
        ("optimizer.learning_rate=1e-3", "optimizer.learning_rate", 1e-3),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
        ("optimizer.milestones=[]", "optimizer.milestones", ()),
        ("optimizer.milestones=[3,5]", "optimizer.milestones", (3, 5)),
        ("optimizer.ema_decay=0.999", "optimizer.ema_decay", 0.999),
        ("optimizer.ema_decay=null", "optimizer.ema_decay", None),
        ("datasets.0.annotations=a=b.json", "datasets.0.annotations", "a=b.json"),
        ("augmentation.flip_probability=0", "augmentation.flip_probability", 0.0),
        ("augmentation=null", "augmentation", None),
        ("amp=off", "amp", "off"),  # YAML alone would say: false
        ("standardize_inputs=false", "standardize_inputs", False),
    ],
)
def test_overrides(override: str, key: str, value: object) -> None:
    found = flatten(load_config(CONFIGS / "mini.yaml", [override]))[key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizer.learnign_rate=1",
            "unknown key optimizer.learnign_rate; did you mean optimizer.learning_rate?",
        ),
        ("learning_rate=1", "unknown key learning_rate; did you mean optimizer.learning_rate?"),
        ("datasets.0.anotations=a", "did you mean datasets.0.annotations?"),
        ("qqq=1", "unknown key qqq; the top-level keys are datasets, name"),
        ("datasets.3.name=a", "datasets.3: a list of 1; say which, 0 to 0"),
        ("steps=1.5", r"steps must be a whole number, got 1.5 \(float\)"),
        ("steps=true", "steps must be a whole number, got True"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate must be a number, got 'fast'"),
        ("standardize_inputs=1", "standardize_inputs must be true or false"),
        ("name=3", "name must be a text, got 3"),
        ("name=..", "name must be a directory's name"),
        (f"name={'a' * 300}", "name must be a directory's name of at most 100 letters"),
        (f"seed={2**70}", "seed must be 0 to 2"),
        (f"optimizer.learning_rate={'9' * 400}", "optimizer.learning_rate must be a number"),
        ("datasets.0.ratio=1000000000000", "datasets.0.ratio must be 1 to 10000"),
        ("optimizer.milestones=3", "optimizer.milestones must be a list, got 3"),
        ("optimizer.milestones=[a]", "optimizer.milestones.0 must be a whole number"),
        ("optimizer=3", "optimizer must hold keys and values"),
        ("steps.x=1", r"steps is a plain value \(8000\): it has no keys"),
        ("features.dtype=float64", "features.dtype must be one of float32, float16, got 'float64'"),
        ("batch_size=0", "batch_size must be 1 or more, got 0"),
        ("model.dropout=1", r"model.dropout must be in \[0, 1\), got 1.0"),
        (
            "optimizer.learning_rate=.nan",
            "optimizer.learning_rate must be more than 0 and finite, got nan",
        ),
        (
            "optimizer.learning_rate=.inf",
            "optimizer.learning_rate must be more than 0 and finite, got inf",
        ),
        ("optimizer.decay_factor=0", r"optimizer.decay_factor must be in \(0, 1\], got 0.0"),
        ("optimizer.decay_factor=10", r"optimizer.decay_factor must be in \(0, 1\]"),
        (
            "optimizer.milestones=[5,3]",
            r"optimizer.milestones must be increasing, 0 or more, got \(5, 3\)",
        ),
        ("optimizer.milestones=[3,3]", "optimizer.milestones must be increasing"),
        ("optimizer.milestones=[-1]", "optimizer.milestones must be increasing, 0 or more"),
        (
            "features.max_skipped=1.5",
            r"features.max_skipped must be a fraction in \[0, 1\], got 1.5",
        ),
        ("max_regions_per_image=0", "max_regions_per_image must be null or 1 or more, got 0"),
        (
            "datasets.0.clean_names=lvis",
            "datasets.0.clean_names must be one of none, coco, got 'lvis'",
        ),
        ("features.max_memory_gib=-1", "features.max_memory_gib must be 0 or more"),
        ("name=a/b", "name must be a directory's name"),
        ("augmentation.crop_size=[5]", "crop_size must be two lengths"),
        ("datasets=[]", "datasets is empty"),
        ("datasets=[{name: a}]", "datasets.0.annotations is missing"),
        ("datasets=[{name: a, annotations: b}, {name: a, annotations: c}]", "share a name"),
        ("model.initial_head=h", "standardize_inputs cannot go with model.initial_head"),
        ("steps", "'steps' is no override: write key=value"),
        ("steps=[", "the value is not YAML"),
    ],
)
def test_errors_name_the_key(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(CONFIGS / "mini.yaml", [override])


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"by its bare name: mini.yaml, regionspot_bb_stage1.yaml"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(InputError, match="is not YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(InputError, match="must hold keys and values"):
        load_config(tmp_path / "list.yaml")


def test_exported_graphs_extract_features_where_all_is_said() -> None:
    graphs = ["features.runtime=openvino", "features.artifacts=artifacts"]
    features = load_config(CONFIGS / "mini.yaml", graphs).features
    assert (features.runtime, features.artifacts, features.precision) == (
        "openvino",
        "artifacts",
        None,
    )
    assert (
        load_config(CONFIGS / "mini.yaml", [*graphs, "features.precision=fp16"]).features.precision
        == "fp16"
    )
    with pytest.raises(
        InputError,
        match=r"features.runtime openvino runs exported graphs: .*features.artifacts=DIR",
    ):
        load_config(CONFIGS / "mini.yaml", graphs[:1])
    with pytest.raises(
        InputError, match=r"torch runs the weights themselves: set features\.runtime too"
    ):
        load_config(CONFIGS / "mini.yaml", graphs[1:])
    with pytest.raises(
        InputError, match=r"int8 exists as exported graphs only: set features\.runtime too"
    ):
        load_config(CONFIGS / "mini.yaml", ["features.precision=int8"])
    with pytest.raises(InputError, match="fp8 exists as exported graphs only"):
        load_config(CONFIGS / "mini.yaml", ["features.precision=fp8"])
    # PyTorch
    assert (
        load_config(CONFIGS / "mini.yaml", ["features.precision=bf16"]).features.precision == "bf16"
    )
    with pytest.raises(
        InputError, match=r"features\.runtime must be one of torch, onnxruntime, openvino"
    ):
        load_config(CONFIGS / "mini.yaml", ["features.runtime=abacus"])


def test_what_a_resumed_run_may_change() -> None:
    def changed(*overrides: str) -> list[str]:
        old: TrainConfig = load_config(CONFIGS / "mini.yaml")
        return differences_on_resume(old, load_config(CONFIGS / "mini.yaml", overrides))

    assert (
        changed(
            "logging.every=3",
            "features.workers=9",
            "datasets.0.annotations=elsewhere.json",
            "name=b",
        )
        == []
    )
    assert (
        changed("features.on_error=skip", "datasets.0.exclude=novel", "features.verify=true") == []
    )
    graphs = [
        "features.runtime=openvino",
        "features.artifacts=artifacts",
        "features.precision=fp16",
    ]
    assert changed(*graphs) == [
        "features.runtime ('torch', now 'openvino')",
        "features.precision (None, now 'fp16')",
    ]
    assert changed("loss_reduction=per_image") == ["loss_reduction ('per_region', now 'per_image')"]
    assert changed("model.sam_weights=elsewhere.pth", "model.clip_weights=elsewhere.pt") == []
    assert changed("seed=3", "optimizer.warmup_steps=7") == [
        "seed (0, now 3)",
        "optimizer.warmup_steps (100, now 7)",
    ]
    assert changed("augmentation={}")[0] == "augmentation.flip_probability (None, now 0.5)"


def test_steps_may_grow_where_no_learning_rate_depends_on_them() -> None:
    def changed(schedule: str, steps: int) -> list[str]:
        old, new = (
            {**MINIMAL, "steps": s, "optimizer": {"schedule": schedule}} for s in (40, steps)
        )
        return differences_on_resume(config_from_dict(old), config_from_dict(new))

    assert changed("multistep", 80) == []
    assert changed("multistep", 20) == ["steps (40, now 20; steps may only grow)"]
    (refused,) = changed("cosine", 80)
    assert refused.startswith("steps (40, now 80; the cosine schedule spreads over all steps")


def test_a_run_from_before_a_key_is_read_as_what_it_did() -> None:
    """An earlier version summed over regions, cleaned names, and averaged without a ramp; it wrote
    none of the keys.
    """
    tree = config_to_dict(config_from_dict({**MINIMAL, "optimizer": {"ema_decay": 0.9}}))
    del tree["loss_reduction"], tree["datasets"][0]["clean_names"], tree["optimizer"]["ema_ramp"]
    old = config_of_run(tree)
    assert (old.loss_reduction, old.datasets[0].clean_names, old.optimizer.ema_ramp) == (
        "per_region",
        "coco",
        False,
    )
    assert "loss_reduction" not in tree  # the caller's is left alone
    differing = differences_on_resume(old, config_from_dict(tree))
    assert [text.split()[0] for text in differing] == [
        "datasets.0.clean_names",
        "loss_reduction",
        "optimizer.ema_ramp",
    ]


def test_packaged_files_are_found_by_their_bare_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("mini.yaml") == load_config("mini") == load_config(CONFIGS / "mini.yaml")
    with pytest.raises(
        InputError, match=r"cannot read the configuration sub/mini.yaml: No such file"
    ):
        load_config("sub/mini.yaml")
    (tmp_path / "mini.yaml").write_text("datasets: [{name: own, annotations: own.json}]")
    assert load_config("mini.yaml").datasets[0].name == "own"  # the user's own file comes first


def test_reading_a_configuration_does_not_import_torch() -> None:
    code = "import sys, regionspot.config; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parents[1], check=False).returncode
        == 0
    )


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """YAML's own readers take the last one without a word."""
    path = tmp_path / "twice.yaml"
    path.write_text("steps: 10\nname: a\nsteps: 20\n")
    with pytest.raises(InputError, match="the key 'steps' stands twice"):
        load_config(path)
    with pytest.raises(InputError, match="cannot read the configuration"):
        load_config("a" * 300)
