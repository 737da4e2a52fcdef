"""docs/fidelity.md says what the code does: fields, flags, presets and figures exist as it says."""

import importlib
import json
import math
import pathlib
import re
from collections.abc import Iterable

import pytest
from ml_collections import ConfigDict

from prism_jax.commands import upcycle

_ROOT = pathlib.Path(__file__).parents[1]
_PAGE = (_ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
_COLUMNS = 6  # number, released, here, field, why, measured
_SETTING = re.compile(r"(align|warmup|rlvr|evaluate): ((?:`[^`]+`(?:, )?)+)")


def _tables() -> dict[str, list[list[str]]]:
    """Return the cells of the rows of each table, by the heading of its section."""
    found: dict[str, list[list[str]]] = {}
    for section in _PAGE.split("\n## ")[1:]:
        lines = [line for line in section.split("\n") if line.startswith("| ")]
        cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
        found[section.split("\n")[0]] = cells[1:]  # the header is no row
    return found


def _items() -> dict[int, list[str]]:
    rows = [row for table in _tables().values() for row in table if row[0].isdigit()]
    return {int(row[0]): row for row in rows}


def _flat(stage: str, options: str) -> dict[str, object]:
    """Return the fields of `configs/STAGE.py:OPTIONS` by name."""

    def walk(config: ConfigDict, place: str):
        for name in config:
            value = config[name]
            if isinstance(value, ConfigDict):
                yield from walk(value, f"{place}{name}.")
            else:
                yield f"{place}{name}", value

    return dict(walk(importlib.import_module(f"configs.{stage}").get_config(options), ""))


def _settings() -> list[tuple[int, str, str, str | None]]:
    """Return (item, stage, field, value or None) of every setting in the column of fields."""
    found = []
    for number, row in _items().items():
        for stage, names in _SETTING.findall(row[3]):
            for setting in re.findall(r"`([^`]+)`", names):
                field, _, value = setting.partition("=")
                found.append((number, stage, field, value or None))
    return found


def test_every_item_has_a_row_and_every_row_says_all():
    assert sorted(_items()) == list(range(1, 50))
    for number, row in _items().items():
        assert len(row) == _COLUMNS, f"item {number} has {len(row)} cells"
        assert all(row), f"item {number} has an empty cell"
        assert _SETTING.search(row[3]) or "`upcycle" in row[3] or "not offered" in row[3], number


def test_every_field_that_the_page_names_exists():
    settings = _settings()
    assert len(settings) > 40
    for number, stage, field, _ in settings:
        assert field in _flat(stage, "4b"), f"item {number}: configs/{stage}.py has no {field}"


def test_every_name_in_the_column_of_fields_stands_behind_its_stage():
    for number, row in _items().items():
        rest = re.findall(r"`([^`]+)`", _SETTING.sub("", row[3]))
        assert not [name for name in rest if "." in name or "=" in name], f"item {number}: {rest}"


def test_every_flag_of_upcycle_that_the_page_names_exists():
    known = {name for action in upcycle.parser()._actions for name in action.option_strings}
    flags = set(re.findall(r"`upcycle (--\w+)", " ".join(row[3] for row in _items().values())))
    assert {"--noise", "--seed", "--router"} <= flags <= known


def _presets() -> dict[str, dict[str, tuple[str, str]]]:
    """Return {preset: {field: (without, with)}} as the page lists them."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for preset, field, before, after in _tables()["Presets"]:
        names = found.setdefault(preset.strip("`"), {})
        names[field.strip("`")] = (before.strip("`"), after.strip("`"))
    return found


@pytest.mark.parametrize("preset", list(_presets()))
@pytest.mark.parametrize("size", ["4b", "8b"])
def test_a_preset_changes_the_listed_fields_and_no_others(preset, size):
    stage, options = re.fullmatch(r"configs/(\w+)\.py:4b(,\S+)", preset).groups()
    base = _flat(stage, size + options.removesuffix(",official"))
    official = _flat(stage, size + options)
    changed = {
        name: (str(base[name]), str(official[name]))
        for name in base
        if base[name] != official[name]
    }
    listed = _presets()[preset]
    if stage == "align":
        listed = _presets()["configs/align.py:4b,official"] | listed
    assert changed == listed


def test_all_presets_are_listed():
    modes = ("acc_gating", "gated_align", "rlvr", "rlvr_v2", "sign_align")
    assert set(_presets()) == {
        "configs/warmup.py:4b,official",
        "configs/align.py:4b,official",
        *(f"configs/align.py:4b,{mode},official" for mode in modes),
        "configs/rlvr.py:4b,official",
        "configs/rlvr.py:4b,dapo,official",
        "configs/rlvr.py:4b,gspo,official",
        "configs/evaluate.py:4b,official",
    }


def test_a_value_of_a_preset_is_told_with_the_item_that_it_belongs_to():
    told = {(stage, field, value) for _, stage, field, value in _settings()}
    told |= {
        (stage, field, value)
        for row in _tables()["Not numbered"]
        for stage, names in _SETTING.findall(row[2])
        for field, value in re.findall(r"`([\w.]+)=([^`]*)`", names)
    }
    for preset, fields in _presets().items():
        stage = re.match(r"configs/(\w+)", preset).group(1)
        for field, (_, value) in fields.items():
            assert (stage, field, value) in told, f"{preset}: {field}={value} is told nowhere"


def _signed(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def _percent(shares: Iterable[float]) -> str:
    return ", ".join(f"{100 * share:.0f}" for share in shares) + " %"


def _ceiling(values: Iterable[float]) -> str:
    """Return the least power of ten that none of the values reaches."""
    return f"{10.0 ** math.ceil(math.log10(max(values))):.0e}"


def _measured() -> list[tuple[str, str]]:
    """Return (row of the page, figure that must stand in it) from the recorded measurement."""
    path = _ROOT / "benchmarks" / "results" / "fidelity_effects.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    return _of_what_is_seen(found) + _of_updates(found)


def _of_what_is_seen(found: dict) -> list[tuple[str, str]]:
    """Return what `_measured` does of texts, pictures, models and single losses."""
    ends, cut = found["items_1_2_3_scored_token"], found["item_1_teacher_cut"]
    scores, sides = found["item_4_positions_item_9_dropout"], found["item_6_padding_side"]
    pictures, noise = found["items_5_31_images"], found["item_11_upcycle_noise"]
    pairs, tokens = found["item_22_pair_normalisation"], found["item_36_token_mean"]
    judged, form, equal = found["item_43_judge"], found["item_19_format"], found["equal_scores"]
    halves = pairs["microbatches_of_2"]
    large = pictures["tokens"]["1600x1200"]
    shares = cut["share_cut_by_median_cot_tokens"]
    ended = [n for n, is_kept in cut["answer_is_kept_by_cot_tokens"].items() if not is_kept]
    router, rounded = found["item_10_router_term"], found["bfloat16_scores"]
    assert not router["reentrant"]["changes_the_routers_gradient"]
    assert router["not_reentrant"]["changes_the_routers_gradient"]
    return [
        ("10", f"whose value is {router['reentrant']['value']:.2f}"),
        ("type of scores", ", ".join(f"{one['mean']:g}" for one in rounded)),
        ("type of scores", ", ".join(f"{one['deviation']:g}" for one in rounded)),
        ("type of scores", ", ".join(f"{one['released_error_rms']:.3f}" for one in rounded)),
        ("type of scores", f"in {_percent(one['released_wrong_signs'] for one in rounded)} of"),
        ("type of scores", f"{_percent(one['released_groups_with_a_tie'] for one in rounded)} of"),
        ("type of scores", f"than {_ceiling(one['our_error_rms'] for one in rounded)} here"),
        ("1", f"{ended[0]} to {ended[-1]} tokens"),
        ("1", ", ".join(f"{100 * share:.1f}" for share in shares.values())),
        ("2", f"{100 * ends['pad_cot_last_token_probe_accuracy']:.0f} %"),
        ("2", f"{100 * ends['last_cot_last_token_probe_accuracy']:.0f} %"),
        ("3", f"{100 * ends['newline_caption_last_token_probe_accuracy']:.0f} %"),
        ("4", f"{scores['positions_mean_distance']:.2f}"),
        ("4", f"{scores['positions_mean_distance_within_prompt']:.2f}"),
        ("5", f"{large['released_warmup']} tokens"),
        ("5", f"{large['released_alignment']} tokens"),
        ("5", f"{large['ours_both']} in both"),
        ("6", f"{100 * sides['random_lengths']['all']:.1f} %"),
        ("6", f"{100 * sides['corpus_lengths']['teacher']:.1f} %"),
        ("6", f"{100 * sides['corpus_lengths']['student']:.1f} %"),
        ("9", f"{scores['dropout_standard_deviation']:.2f}"),
        ("11", f"{noise['noise_over_weights']:.2f}"),
        ("11", f"{noise['change_of_an_experts_output_over_output']:.2f}"),
        ("18", f"{found['item_18_invalid_group']['advantage']:.1f}".replace("-", "−")),
        ("19", f"{form['official_passes_malformed']} of {form['malformed']}"),
        ("19", f"{form['strict_passes_malformed']} here"),
        ("22", f"{pairs['orders']} orders of {pairs['responses']} responses"),
        ("22", f"{pairs['well_formed']} well-formed"),
        ("22", f"{halves['loss_least']:.2f} to {halves['loss_most']:.2f}"),
        ("22", f"{pairs['whole_batch']['loss_most']:.2f}"),
        ("22", f"{halves['gradient_of_a_score_most_over_least']:.1f}"),
        ("31", f"{100 * pictures['other_grid_when_resized_twice']:.0f} %"),
        ("36", f"−{-tokens['released_loss_least']:.2f} to {tokens['released_loss_most']:.2f}"),
        ("36", f"−{-tokens['our_loss']:.2f}"),
        ("36", f"all {tokens['splits']} splits of {len(tokens['response_tokens'])} responses"),
        ("36", f"{tokens['released_weight_of_a_token_over_ours_least']:.2f} to"),
        ("36", f"to {tokens['released_weight_of_a_token_over_ours_most']:.2f}"),
        ("43", f"{judged['released_wrong_called_right']} of {judged['cases']}"),
        ("43", f"{judged['released_right_called_wrong']} right"),
        ("43", f"{judged['ours_right_called_wrong']} and {judged['ours_wrong_called_right']} here"),
        ("43", f"equals the record in all {judged['released_equals_record']}"),
        ("equal scores in a group", f"{equal['released']['7']['of_0.7']:.3f}"),
        ("equal scores in a group", f"{equal['released']['11']['of_0.7']:.3f}"),
        ("equal scores in a group", f"{equal['released']['16']['of_0.2']:.3f}"),
        ("equal scores in a group", f"{equal['ours_most']:.0f} here"),
    ]


def _of_updates(found: dict) -> list[tuple[str, str]]:
    """Return what `_measured` does of advantages, steps and weight decay."""
    bias, alone = found["item_12_head_bias"], found["item_23_no_pair"]
    unjudged, looser = found["item_24_nobody_judges"], found["item_25_looser_format"]
    reached = found["item_39_fruitful_steps"]["by_varying_share"].values()
    unscored = looser["mean_advantage_by_mean_score"].values()
    (penalty,) = {_signed(told["ours"]) for told in unscored}
    decay = found["norm_decay"]
    still = [told["ours_lost"] for told in decay.values()]
    still += [decay[name]["released_lost"] for name in ("align", "grpo")]
    cases = found["item_19_format"]["cases"]
    return [
        ("12", f"by {bias['advantages_change_at_most']:.0e} at most"),
        ("12", f"is {bias['gradient_of_a_bias_from_pairs']:g} from the pairs"),
        ("12", f"{bias['gradient_of_a_bias_from_regulariser']:.4f} from the regulariser"),
        ("23", f"score is {_signed(alone['released_gradient_of_a_teacher'], 3)}"),
        ("23", f"16 pairs give {_signed(alone['gradient_with_16_pairs'], 1)}"),
        ("23", f"and {alone['our_gradient_of_a_teacher']:g} here"),
        ("23", f"comes to rest at {alone['released_score_at_rest']:.1f}"),
        ("24", f"{unjudged['released_mean_of_wrong']:.2f} on average"),
        ("24", f"{100 * unjudged['released_share_of_wrong_above_0']:.0f} % of them"),
        ("24", f"{_signed(unjudged['ours_mean_of_wrong'])} and"),
        ("24", f"{100 * unjudged['ours_share_of_wrong_above_0']:.0f} % here"),
        ("25", f"{looser['valid_without_scores']} of the {cases} recorded texts"),
        ("25", ", ".join(_signed(told["released"]) for told in unscored) + " on average"),
        ("25", f"about {', '.join(looser['mean_advantage_by_mean_score'])}".replace("-", "−")),
        ("25", f"{penalty} here"),
        ("39", f"{found['item_39_fruitful_steps']['generations']} generations"),
        ("39", ", ".join(str(told["released"]["steps"]) for told in reached) + " steps"),
        ("39", ", ".join(str(told["ours"]["steps"]) for told in reached) + " steps here"),
        ("39", f"{_percent(told['released']['thrown_away'] for told in reached)} of the varying"),
        ("39", f"with {_percent(told['ours']['thrown_away'] for told in reached)}"),
        ("weight decay", f"{decay['warmup']['released_lost']:.0e} in"),
        ("weight decay", f"{decay['warmup']['steps']} steps of warm-up"),
        ("weight decay", f"{decay['dapo']['released_lost']:.0e} in DAPO"),
        ("weight decay", "decays" if any(still) else "nothing in alignment and GRPO"),
        ("format of geo3k", f"{looser['malformed_that_earn_official']} of {looser['malformed']}"),
        ("format of geo3k", f"{looser['malformed_that_earn_strict']} here"),
    ]


@pytest.mark.parametrize(("place", "figure"), _measured())
def test_a_measured_figure_is_the_recorded_one(place, figure):
    if place.isdigit():
        cell = _items()[int(place)][-1]
    else:
        (cell,) = (row[-1] for row in _tables()["Not numbered"] if row[0] == place)
    assert figure in cell
