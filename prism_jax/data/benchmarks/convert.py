"""Convert a published benchmark to a folder that `evaluate` reads, all or nothing."""

import functools
import pathlib
from collections.abc import Iterator

from prism_jax import errors
from prism_jax.data import build, manifest, records, validate
from prism_jax.data.benchmarks import files, layout
from prism_jax.rewards.benchmarks import facts as facts_lib


def convert(
    published: layout.Layout,
    source: str,
    out: str,
    rules: validate.Rules,
    *,
    protocol: facts_lib.Protocol,
) -> manifest.Manifest:
    """Write the questions of a benchmark to the new folder `out`, in the published order.

    Raises:
      InputError: as `build.write`, or questions that are scored together are not complete.
    """
    folder = pathlib.Path(source)
    paths = files.find(folder, published)
    part = build.Part(
        candidates=_candidates(published, paths, folder, protocol),
        label=published.name,
        names=[path.name for path in paths],
        through=functools.partial(_complete, published),
    )
    return build.write({"test": part}, out, rules, kind="prompts")


def _candidates(
    published: layout.Layout,
    paths: list[pathlib.Path],
    folder: pathlib.Path,
    protocol: facts_lib.Protocol,
) -> Iterator[validate.Candidate]:
    parse = functools.partial(published.parse, protocol=protocol)
    index = 0
    for path in paths:
        for number, fields in files.table(path).scan():
            yield validate.Candidate(
                index=index,
                place=records.Place(file=path.name, row=number),
                fields=fields,
                parse=parse,
                image_root=str(folder if folder.is_dir() else folder.parent),
            )
            index += 1


def _complete(
    published: layout.Layout, rows: Iterator[records.PromptRow]
) -> Iterator[records.PromptRow]:
    """Yield the rows; at their end raise InputError if questions of a group are missing."""
    groups = []
    for row in rows:
        groups.append(row.extra_info[facts_lib.KEY]["group"])
        yield row
    problem = published.problem(groups)
    if problem is not None:
        raise errors.InputError(f"{published.name}: {problem}")
