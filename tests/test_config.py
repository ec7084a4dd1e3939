"""Configuration: what is accepted, what is refused and with which words, and that refusing leaves no trace."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from solver_utils import SCHEDULE_TYPES
from training.ppo.config import CHOICES, Config, ConfigError, check_world_size, differences, load_config, to_yaml
from training.ppo.inputs import split_prompts, start_table
from training.ppo.launch import main
from training.table import SolverTable, load_table, save_table

REPOSITORY = Path(__file__).resolve().parents[1]
PRESETS = sorted((REPOSITORY / "training" / "ppo" / "cfgs").glob("*.yaml"))

VALID = """
run: {{output_root: {root}/exps, run_name: t}}
data: {{prompt_csv: {root}/prompts.txt}}
model: {{dataset_name: emoji, num_steps: 6, num_points: 2}}
reward: {{type: hps, weights_path: {root}/weights/HPS_v2.1_compressed.pt}}
evaluation: {{num_prompts: 2}}
"""


@pytest.fixture
def config_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na cow\n")
    path = tmp_path / "config.yaml"
    path.write_text(VALID.format(root=tmp_path))
    return path


def run_cli(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_off_needs_no_quotes(tmp_path):
    path = tmp_path / "run.yaml"
    for text in ("off", '"off"'):
        path.write_text(f"model: {{num_steps: 3, num_points: 2, compile: {text}}}")
        config = load_config(path)
        assert config.model.compile == load_config(path, [f"model.compile={text}"]).model.compile == "off"
        (tmp_path / "again.yaml").write_text(to_yaml(config))
        assert differences(config, load_config(tmp_path / "again.yaml")) == []
    with pytest.raises(ConfigError, match=r"model\.compile=all must be one of: off, default, max"):
        load_config(path, ["model.compile=all"])


def test_presets_are_there():
    assert [path.stem for path in PRESETS] == ["embedded", "sd15_parallel", "sd15_single"]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_dry_run_prints_what_reads_back_and_writes_nothing(path, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    result = run_cli("--config", path, "--override", f"run.output_root={tmp_path}/exps", "--dry-run")
    assert result.exit_code == 0, result.output
    (tmp_path / "again.yaml").write_text(result.stdout)
    again = load_config(tmp_path / "again.yaml")
    assert not differences(again, load_config(path, [f"run.output_root={tmp_path}/exps"]))
    assert not (tmp_path / "exps").exists()


def test_parallel_preset_suits_eight_processes():
    check_world_size(load_config(REPOSITORY / "training/ppo/cfgs/sd15_parallel.yaml"), 8)


def test_dry_run_needs_no_torch(config_file):
    program = (
        "import sys; from training.ppo.launch import main;"
        f"main(['--config', {str(config_file)!r}, '--dry-run'], standalone_mode=False);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.DEVNULL).returncode == 0


def test_overrides_are_applied_in_order_and_typed(config_file):
    config = load_config(
        config_file,
        ["ppo.steps=7", "ppo.steps=8", "ppo.learning_rate=1e-4", "ppo.max_grad_norm=null", "ppo.shared_noise=false"],
    )
    assert (config.ppo.steps, config.ppo.learning_rate, config.ppo.max_grad_norm) == (8, 1e-4, None)
    assert config.ppo.shared_noise is False
    assert load_config(config_file, ["evaluation.metrics=[a, b]"]).evaluation.metrics == ["a", "b"]
    assert load_config(config_file, ["run.run_name=2024"]).run.run_name == "2024"
    assert load_config(config_file, ["data.prompt_csv=a=b.txt"]).data.prompt_csv == "a=b.txt"


def test_values_can_refer_to_others(config_file):
    overrides = ["run.run_name=sd-${ppo.steps}-${model.num_steps}", "distill.prompts=${ppo.steps}", "ppo.steps=7"]
    config = load_config(config_file, overrides)
    assert config.run.run_name == f"sd-7-{config.model.num_steps}" and config.distill.prompts == 7
    with pytest.raises(ConfigError, match=r"data\.prompt_csv refers to run\.run_name, which refers to another key"):
        load_config(config_file, [*overrides, "data.prompt_csv=${run.run_name}.txt"])


def test_round_trip_keeps_every_value(config_file, tmp_path):
    config = load_config(config_file, ["ppo.learning_rate=0.1", "model.sigma_min=0.03", "evaluation.metrics=[x]"])
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_differences_name_keys():
    changed = Config()
    changed.ppo.clip_range, changed.run.seed = 0.3, 9
    assert differences(Config(), changed) == ["run.seed", "ppo.clip_range"]


def test_schedule_names_agree_with_their_owner():
    assert CHOICES["model.schedule_type"] == SCHEDULE_TYPES


BAD_OVERRIDES = [
    ("ppo.kl_coeff=0.5", "unknown key `ppo.kl_coeff`; did you mean `ppo.kl_coef`?"),
    ("kl_coef=0.5", "unknown section `kl_coef`; did you mean `ppo.kl_coef`?"),
    ("pppo.steps=3", "unknown section `pppo`; did you mean `ppo`?"),
    ("model.learning_rate=3", "unknown key `model.learning_rate`; did you mean `ppo.learning_rate`?"),
    ("ppo.steps=many", "ppo.steps must be of type int"),
    ("ppo.steps=1.5", "ppo.steps must be of type int"),
    ("ppo.steps=true", "ppo.steps must be of type int"),
    ("ppo.steps=null", "ppo.steps must be of type int"),
    ("ppo.shared_noise=2", "ppo.shared_noise must be of type bool"),
    ("ppo.shared_noise=maybe", "ppo.shared_noise must be of type bool"),
    ("ppo.learning_rate=fast", "ppo.learning_rate must be of type float"),
    ("ppo.max_grad_norm=[1]", "ppo.max_grad_norm must be of type float | None"),
    ("evaluation.metrics=emoji_heldout", "evaluation.metrics must be of type list[str]"),
    ("ppo=3", "section `ppo` must hold `key: value` lines"),
    ("ppo.steps", "expected section.key=value"),
    ("ppo.steps=[", "--override ppo.steps=[: "),
    ("run.seed=${ppo.nothing}", "Interpolation key 'ppo.nothing' not found"),
    ("run.run_name=${run.run_name}", "run.run_name refers to run.run_name, which refers to another key"),
    ("ppo.clip_range=.nan", "ppo.clip_range=nan must be a finite number"),
    ("ppo.clip_range=0", "ppo.clip_range=0.0 must be above 0"),
    ("ppo.learning_rate=-1", "ppo.learning_rate=-1.0 must be above 0"),
    ("ppo.rloo_k=1", "ppo.rloo_k=1 must be at least 2"),
    ("ppo.rollout_batch_size=30", "rollout_batch_size=30 is not a multiple of ppo.rloo_k=4; use 28 or 32"),
    ("ppo.rollout_batch_size=2", "rollout_batch_size=2 is not a multiple of ppo.rloo_k=4; use 4"),
    ("ppo.minibatch_size=12", "rollout_batch_size=32 is not a multiple of ppo.minibatch_size=12"),
    ("ppo.baseline=median", "ppo.baseline=median must be one of: prompt, legacy_mixed"),
    ("policy.parameterization=cnn", "policy.parameterization=cnn must be one of: direct, mlp"),
    ("model.schedule_type=linear", "model.schedule_type=linear must be one of: polynomial"),
    ("trainer.algorithm=cmaes", "trainer.algorithm=cmaes must be one of: rdpo, pathwise"),
    ("ppo.concentration_end=0", "ppo.concentration_end=0.0 must be above 0"),
    ("evaluation.on_divergence=halt", "evaluation.on_divergence=halt must be one of: flag, stop"),
    ("evaluation.on_divergence=stop", "on_divergence=stop needs a held-out metric in evaluation.metrics"),
    ("distill.grid_points=1", "distill.grid_points=1 must be at least 2"),
    ("model.num_steps=1", "model.num_steps=1 must be at least 2"),
    ("model.num_points=null", "model.num_steps and model.num_points are needed to build the start table"),
    ("run.run_name=../x", "run.run_name='../x' must be a plain folder name"),
    ("run.run_name=''", "run.run_name='' must be a plain folder name"),
    ("evaluation.metrics=[hps]", "evaluation.metrics holds hps, a trained reward"),
    ("data.prompt_csv=/no/such.txt", "data.prompt_csv=/no/such.txt does not exist"),
    ("data.predictor_snapshot=/no/such.pkl", "data.predictor_snapshot=/no/such.pkl does not exist; make a start table"),
    ("evaluation.prompt_file=/no/such.txt", "evaluation.prompt_file=/no/such.txt does not exist"),
    ("reward.type=hpsv3", "reward.type=hpsv3 is unknown; use one of hps"),
    ("reward.weights_path=/no/HPS.pt", "/no/HPS.pt is missing: download HPS_v2.1_compressed.pt from https://"),
    ("evaluation.num_prompts=3", "has no prompt left to train on beside the 3 held out"),
]


def assert_refused(result, root, *words):
    """Exit code 2, one line on stderr with these words, and no run folder."""
    assert result.exit_code == 2, result.output
    message = result.stderr.strip()
    assert "\n" not in message and message.startswith("Error: ")
    for word in words:
        assert word in message, message
    assert not (root / "exps").exists()


@pytest.mark.parametrize(("override", "words"), BAD_OVERRIDES, ids=[override for override, _ in BAD_OVERRIDES])
def test_bad_values_are_refused_at_the_door(config_file, tmp_path, override, words):
    assert_refused(run_cli("--config", config_file, "--override", override, "--device", "cpu"), tmp_path, words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"- run\n", "must hold sections"),
        (b"ppo: [1\n", "is not valid YAML"),
        (b"ppo:\n  steps: 1\n  steps: 2\n", "found duplicate key steps"),
        (b"ppo:\n", "section `ppo` must hold"),
        (b"\xff\xfe\n", "is not valid YAML"),
        (b"just words", "unknown section `just words`"),
        (b"3: {}\n", "unknown section `3`"),
        (b"ppo: &a {steps: 3}\nppo: *a\n", "aliases such as *a are not supported; write the value again"),
        (b"ppo: {steps: !!int 3}\n", "tags such as tag:yaml.org,2002:int are not supported"),
        (b"ppo: " + b"[" * 30, "it is nested too deeply"),
        (b"run: {run_name: '${oc.env:HOME}'}\n", "in ${oc.env:HOME} only references such as ${run.seed} are possible"),
        (b"run: {run_name: '" + b"${run.seed}" * 21 + b"'}\n", "are possible, 20 in all"),
        (b'run: {run_name: "a\\u001b[2J"}\n', r"'a\x1b[2J' holds characters that cannot be printed"),
        (b"ppo: {steps: 9999999999999999999999}\n", "a number has more than 63 bits"),
    ],
)
def test_broken_yaml_is_refused(config_file, tmp_path, text, words):
    config_file.write_bytes(text)
    assert_refused(run_cli("--config", config_file), tmp_path, words, str(config_file))


def test_missing_config(tmp_path):
    assert_refused(run_cli("--config", tmp_path / "none.yaml"), tmp_path, "none.yaml", "No such file")
    assert_refused(run_cli(), tmp_path, "--config FILE is missing")
    assert_refused(run_cli("--resume", tmp_path / "gone"), tmp_path, "gone/configs/resolved_config.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "prompts.txt is empty"),
        ("a cat\n\na dog\n", "prompts.txt, line 2: blank prompt"),
        ("a cat\na dog\n   \n", "prompts.txt, line 3: blank prompt"),
    ],
)
@pytest.mark.parametrize("key", ["data.prompt_csv", "evaluation.prompt_file"])
def test_bad_prompt_files(config_file, tmp_path, key, text, words):
    (tmp_path / "bad").mkdir()
    bad = tmp_path / "bad" / "prompts.txt"
    bad.write_text(text)
    assert_refused(run_cli("--config", config_file, "--override", f"{key}={bad}"), tmp_path, words)


@pytest.mark.parametrize("suffix", [".pkl", ".safetensors", ".json"])
def test_truncated_predictor(config_file, tmp_path, suffix):
    path = tmp_path / f"table{suffix}"
    save_table(SolverTable(positions=[[0.3, 0.6]] * 5, weights=[[0.5, 0.5]] * 5), path)
    path.write_bytes(path.read_bytes()[:-40])
    result = run_cli("--config", config_file, "--override", f"data.predictor_snapshot={path}")
    assert_refused(result, tmp_path, str(path))


def test_a_table_of_another_size_is_refused(config_file, tmp_path):
    save_table(SolverTable(positions=[[0.5]] * 7, weights=[[1.0]] * 7), tmp_path / "t.json")
    result = run_cli("--config", config_file, "--override", f"data.predictor_snapshot={tmp_path}/t.json")
    assert_refused(result, tmp_path, "model.num_steps=6", "t.json has 8")


def test_batch_must_divide_among_processes():
    with pytest.raises(ConfigError, match="rollout_batch_size=32 is not a multiple of the 3 processes"):
        check_world_size(Config(), 3)


def test_start_table_of_a_snapshot(config_file, tmp_path, capsys):
    table = SolverTable(
        positions=[[0.1, 0.6]] * 5, weights=[[0.4, 0.6]] * 5, dataset_name="emoji", sigma_min=0.05, guidance_rate=3.0
    )
    save_table(table, tmp_path / "t.json")
    overrides = [f"data.predictor_snapshot={tmp_path}/t.json", "model.num_steps=null", "model.sigma_max=9"]
    start = start_table(load_config(config_file, overrides))
    assert start.positions.tolist() == load_table(tmp_path / "t.json").positions.tolist()
    # The configuration decides, except for what it leaves open; each difference is told.
    assert (start.guidance_rate, start.sigma_min, start.sigma_max) == (7.5, 0.05, 9.0)
    notes = capsys.readouterr().err
    assert "guidance_rate=3.0; this run uses model.guidance_rate=7.5" in notes and "sigma_min" not in notes


def test_evaluated_prompts_are_never_trained_on(config_file, tmp_path):
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nb\nd\ne\n")
    assert split_prompts(load_config(config_file)) == (["a", "b", "c", "b"], ["d", "e"])
    (tmp_path / "held.txt").write_text("b\nz\ny\n")
    named = load_config(config_file, [f"evaluation.prompt_file={tmp_path}/held.txt"])
    assert split_prompts(named) == (["a", "c", "d", "e"], ["b", "z"])
    assert split_prompts(load_config(config_file, ["evaluation.interval=0"])) == (["a", "b", "c", "b", "d", "e"], [])
