from collections.abc import Callable
from pathlib import Path

import pytest

import trainer
from towers.errors import CrossTowerFeatureError, InvalidInputError, InvalidSchemaError
from trainer.config import read_config

MINIMAL = """
[data]
interactions = "interactions.parquet"
items = "items.parquet"

[[features]]
name = "user_id"
owner = "query"
kind = "categorical"

[[features]]
name = "item_id"
owner = "item"
kind = "categorical"

[model]
dim = 8
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def written(content: str) -> Path:
        path = tmp_path / "some.toml"
        path.write_text(content)
        return path

    return written


def refusal(path: Path) -> list[str]:
    with pytest.raises(InvalidInputError) as caught:
        read_config(path)
    return str(caught.value).splitlines()


def test_defaults_fill_in_what_is_left_out(write: Callable[[str], Path]) -> None:
    config = read_config(write(MINIMAL))
    assert config.model.dim == 8
    assert config.training.logq == "counts"
    assert config.evaluation.ks == (10,)
    assert [feature.name for feature in config.feature_schema().features] == ["user_id", "item_id"]


@pytest.mark.parametrize("name", ["movielens-100k.toml", "movielens-100k-wide.toml"])
def test_bundled_configurations_are_valid(name: str) -> None:
    config = read_config(Path(trainer.__file__).parent / "configs" / name)
    names = {feature.name for feature in config.feature_schema().features}
    assert names >= {"user_id", "history", "item_id"}


def test_bundled_configurations_differ_in_dimension_and_architecture() -> None:
    folder = Path(trainer.__file__).parent / "configs"
    first, second = (read_config(folder / name).model for name in ("movielens-100k.toml", "movielens-100k-wide.toml"))
    assert first.dim != second.dim
    assert (first.query_hidden, first.item_hidden) != (second.query_hidden, second.item_hidden)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("dim = 8", "dim = 0", ["[model] dim = 0", "greater than or equal to 1"]),
        ("dim = 8", 'dim = "8"', ["[model] dim", "valid integer"]),
        ("dim = 8", "", ["[model] dim: missing"]),
        ("dim = 8", "dim = 8\ndropuot = 0.1", ["[model] dropuot: unknown key", "did you mean 'dropout'?"]),
        ("dim = 8", "dim = 8\nqwerty = 1", ["[model] qwerty: unknown key", "use one of", "'query_hidden'"]),
        ("dim = 8", "dim = 8\nquery_hidden = [16, 0]", ["[model] query_hidden", "from 1 to 65536"]),
        ("dim = 8", "dim = 8\nmatryoshka_dims = [8]", ["[model] matryoshka_dims = [8]", "below dim, rising"]),
        ("dim = 8", "dim = 8\nmatryoshka_dims = [4, 2]", ["[model] matryoshka_dims = [4, 2]", "rising"]),
        ("dim = 8", "dim = 8\nmatryoshka_dims = [0, 2]", ["[model] matryoshka_dims = [0, 2]", "from 1"]),
        (
            "dim = 8",
            "dim = 8\nmatryoshka_dims = [4]\n[export]\ndim = 2",
            ["[export]", "dim = 2 is not a width that is trained", "matryoshka_dims"],
        ),
        ("dim = 8", "dim = 8\n[training]\ntemperature = 0.0", ["[training] temperature = 0.0", "greater than 0"]),
        ("dim = 8", "dim = 8\n[training]\nlearning_rate = inf", ["[training] learning_rate", "finite"]),
        (
            "dim = 8",
            'dim = 8\n[training]\nnegatives = "all"\nuniform_negatives = 5\nmemory = 9',
            ["[training]", "leave out uniform_negatives and memory"],
        ),
        (
            "dim = 8",
            'dim = 8\n[training]\nnegatives = "all"\nhard_negatives = 1',
            ["[training]", "leave out hard_negatives"],
        ),
        (
            "dim = 8",
            "dim = 8\n[training]\nhard_negatives = 3\nhard_negatives_ranks = [4, 5]",
            ["[training] hard_negatives_ranks = [4, 5]", "a window with room for hard_negatives"],
        ),
        ("dim = 8", "dim = 8\n[training]\nshown_negatives = 2", ["shown_negatives", "name [data] label_column"]),
        ("dim = 8", "dim = 8\n[training]\nhard_negatives_ranks = [0, 9]", ["hard_negatives_ranks", "from 1"]),
        ("dim = 8", "dim = 8\n[training]\nhard_negatives_every = 0", ["hard_negatives_every = 0", "equal to 1"]),
        (
            "dim = 8",
            'dim = 8\n[training]\nnegatives = "all"\nlogq = "streaming"',
            ["[training]", 'leave out logq = "streaming"'],
        ),
        ("dim = 8", 'dim = 8\n[training]\nprecision = "float16"', ["[training] precision", "'float32' or 'bfloat16'"]),
        ("dim = 8", 'dim = 8\n[training]\nlogq = "stream"', ["[training] logq", "'counts', 'streaming' or 'none'"]),
        (
            "dim = 8",
            "dim = 8\n[training]\nhistory_share = 0.5\nsymmetric = true\nmask_known_positives = false",
            ["[training]", "leave out mask_known_positives = false and symmetric"],
        ),
        ("dim = 8", "dim = 8\n[training]\nscore_margin = 5.0", ["[training] score_margin", "less than or equal to 2"]),
        ("dim = 8", "dim = 8\n[evaluation]\nks = [10, 5]", ["[evaluation] ks", "rising"]),
        ("dim = 8", "dim = 8\n[evaluation]\nks = []", ["[evaluation] ks", "rising"]),
        ("dim = 8", 'dim = 8\n[evaluation]\nmetric = "recall_at_7"', ["[evaluation] metric", "recall_at_10"]),
        ("dim = 8", "dim = 8\n[trainign]\nseed = 1", ["trainign: unknown key", "did you mean 'training'?"]),
        ('items = "items.parquet"', "", ["[data] items: missing"]),
        ('kind = "categorical"', 'kind = "sequence"\nitems = "brand"', ["[[features]]", "'user_id'", "'brand'"]),
        ('kind = "categorical"', 'kind = "categorial"', ["[[features]]", "user_id", "categorial"]),
        ('kind = "categorical"', 'kind = "categorical"\nbuckets = 3', ["[[features]]", "user_id", "buckets"]),
        ('owner = "item"', 'owner = "query"', ["[[features]]", "item tower has no feature"]),
    ],
)
def test_a_mistake_is_one_line_that_names_file_key_and_fix(
    write: Callable[[str], Path], before: str, after: str, expected: list[str]
) -> None:
    assert before in MINIMAL
    path = write(MINIMAL.replace(before, after, 1))
    [line] = refusal(path)
    for part in [f"{path}: ", *expected]:
        assert part in line


@pytest.mark.parametrize(("switch", "meaning"), [("true", "counts"), ("false", "none")])
def test_logq_as_a_switch_goes_on_working(write: Callable[[str], Path], switch: str, meaning: str) -> None:
    assert read_config(write(f"{MINIMAL}[training]\nlogq = {switch}\n")).training.logq == meaning


def test_all_mistakes_are_reported_together(write: Callable[[str], Path]) -> None:
    content = MINIMAL.replace("dim = 8", "dim = -1\ndropout = 2.0").replace('kind = "categorical"', 'kind = "odd"', 1)
    lines = refusal(write(content + "[training]\nbatch_size = 1\n"))
    assert len(lines) == 4
    for part in ("[model] dim", "[model] dropout", "[training] batch_size", "[[features]]"):
        assert sum(part in line for line in lines) == 1


def test_a_feature_of_the_interaction_table_is_refused_by_name(write: Callable[[str], Path]) -> None:
    path = write(
        MINIMAL + '\n[[features]]\nname = "clicked"\nowner = "item"\nkind = "number"\nsource = "interactions"\n'
    )
    with pytest.raises(CrossTowerFeatureError, match=r"some\.toml.*'clicked'.*reranker"):
        read_config(path)


def test_a_sequence_has_no_table_of_its_own(write: Callable[[str], Path]) -> None:
    history = '\n[[features]]\nname = "history"\nowner = "query"\nkind = "sequence"\nitems = "item_id"\n'
    assert read_config(write(MINIMAL + history))
    [line] = refusal(write(MINIMAL + history + "embedding_dim = 4\n"))
    assert "'history', embedding_dim" in line
    assert "'item_id'" in line


def test_heads_share_the_width_of_a_history_evenly(write: Callable[[str], Path]) -> None:
    history = '[[features]]\nname = "history"\nowner = "query"\nkind = "sequence"\nitems = "item_id"\n'
    file = write(MINIMAL + history + 'pooling = "transformer"\n')
    file.write_text(file.read_text().replace("[model]\n", "[model]\ntransformer_heads = 5\n"))
    [line] = refusal(file)
    assert "'history', pooling: 32 columns of 'item_id' cannot be shared out among 5 heads" in line
    assert "embedding_dim" in line


def test_schema_mistakes_keep_their_class(write: Callable[[str], Path]) -> None:
    with pytest.raises(InvalidSchemaError):
        read_config(write(MINIMAL.replace('name = "item_id"', 'name = "user_id"')))


def test_files_that_are_no_toml(tmp_path: Path, write: Callable[[str], Path]) -> None:
    [line] = refusal(tmp_path / "absent.toml")
    assert "absent.toml: cannot be read" in line
    [line] = refusal(write("[data\n"))
    assert "some.toml: not valid TOML" in line
    assert "line 1" in line


def test_features_that_are_no_list(write: Callable[[str], Path]) -> None:
    table = '[data]\ninteractions = "i.csv"\nitems = "n.csv"\n[model]\ndim = 8\n[features]\nname = "user_id"\n'
    [line] = refusal(write(table))
    assert "some.toml: [[features]]: declare each feature in a [[features]] table of its own" in line
