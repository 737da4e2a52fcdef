"""The published layouts of the benchmarks, made small: the same folders, files, columns, types."""

import pathlib

import pyarrow as pa
import pyarrow.parquet as pq

from tests import data_files

_SHORT = ["3/11", "8/11", "6/11"]
_TEN = [f"option {letter}" for letter in "ABCDEFGHIJ"]


def _picture(shade: int) -> dict:
    return {"bytes": data_files.png(shade), "path": f"{shade}.png"}


def _mathvista() -> list[dict]:
    def row(pid: str, shade: int, **changes) -> dict:
        metadata = {"task": "geometry problem solving", "split": "testmini", "skills": ["algebra"]}
        shared = {"choices": None, "unit": None, "precision": None, "query": f"query {pid}"}
        shared |= {"pid": pid, "image": f"images/{pid}.jpg", "decoded_image": _picture(shade)}
        return shared | {"metadata": metadata, "question_type": "free_form"} | changes

    return [
        row(
            "1",
            10,
            question="What fraction is blue?",
            choices=_SHORT,
            answer="8/11",
            question_type="multi_choice",
            answer_type="text",
        ),
        row("2", 20, question="How many?", answer="14", answer_type="integer", unit="$"),
        row("3", 30, question="How long?", answer="0.6", answer_type="float", precision=1.0),
        row("4", 40, question="How much?", answer="1.45", answer_type="float", precision=2.0),
        row("5", 50, question="Which years?", answer="[2007, 2008]", answer_type="list"),
    ]


def _mathvision() -> list[dict]:
    def row(number: int, question: str, options: list[str], answer: str) -> dict:
        return {
            "id": str(number),
            "question": question,
            "options": options,
            "image": f"images/{number}.jpg",
            "decoded_image": _picture(60 + number),
            "answer": answer,
            "solution": None,
            "level": 3,
            "subject": "algebra" if options else "arithmetic",
        }

    return [
        row(1, "Which is the largest? <image1>", ["1", "$\\frac{3}{2}$", "0.5"], "B"),
        row(2, "What is the sum? <image1>", [], "12"),
    ]


def _mathverse() -> list[dict]:
    def row(number: int, version: str, kind: str, answer: str, image: dict | None) -> dict:
        return {
            "sample_index": str(number),
            "problem_index": "1",
            "problem_version": version,
            "question": "Find x.",
            "image": image,
            "answer": answer,
            "question_type": kind,
            "metadata": {"split": "testmini", "subject": "Plane Geometry"},
            "query_wo": f"Answer the question {number}.\nQuestion: Find x.",
            "query_cot": f"Think about {number}.",
            "question_for_eval": "Find x.",
        }

    return [
        row(1, "Text Dominant", "multi-choice", "A", _picture(70)),
        row(2, "Text Only", "free-form", "12 cm", None),
    ]


def _wemath() -> list[dict]:
    def row(problem: str, key: str, answer: str, shade: int) -> dict:
        return {
            "ID": problem,
            "split": "testmini",
            "knowledge concept": "Area",
            "question": f"Question {problem} {key}?",
            "option": "A. 1; B. 2; C. 3; D. No correct answer",
            "answer": answer,
            "image_path": _picture(shade),
            "key": key,
            "question number": shade,
            "knowledge concept description": "{}",
        }

    # As published, problems of two and of three steps are numbered apart.
    two = [row("1", f"2steps_{part}", "A", 80 + i) for i, part in enumerate(("1", "2", "multi"))]
    three = [
        row("1", f"3steps_{part}", "B", 90 + i) for i, part in enumerate(("1", "2", "3", "multi"))
    ]
    return [*two, *three]


def _pictures(shades: dict[int, int]) -> dict:
    return {
        f"image_{number}": _picture(shades[number]) if number in shades else None
        for number in range(1, 8)
    }


def _mmmu() -> list[dict]:
    shared = {"explanation": "", "img_type": "['Diagrams']", "topic_difficulty": "Easy"}
    shared |= {"subfield": "Optics"}
    return [
        {
            "id": "validation_Physics_1",
            "question": "Between <image 1> and <image 2>, which?",
            "options": "['the first', '<image 3>']",
            "answer": "B",
            "question_type": "multiple-choice",
            **_pictures({1: 101, 2: 102, 3: 103}),
            **shared,
        },
        {
            "id": "validation_Art_Theory_2",
            "question": "Look at <image 2>, then at <image 1>, again at <image 2>. Name it.",
            "options": "[]",
            "answer": "['fresco', 'frescoes']",
            "question_type": "open",
            **_pictures({1: 104, 2: 105}),
            **shared,
        },
    ]


def _mmmu_pro_standard() -> list[dict]:
    return [
        {
            "id": "test_Chemistry_12",
            "question": "Which one is in <image 1>?",
            "options": repr(_TEN),
            "explanation": "",
            **_pictures({1: 111}),
            "img_type": "['Diagrams']",
            "answer": "J",
            "topic_difficulty": "Hard",
            "subject": "Chemistry",
        }
    ]


def _mmmu_pro_vision() -> list[dict]:
    return [
        {
            "id": "test_Chemistry_12",
            "image": _picture(121),
            "options": repr(_TEN),
            "answer": "C",
            "subject": "Chemistry",
        }
    ]


def _hallusion() -> list[dict]:
    def row(figure: int, question: int, answer: str, category: str = "VD") -> dict:
        return {
            "category": category,
            "subcategory": "chart",
            "visual_input": "1",
            "set_id": "0",
            "figure_id": str(figure),
            "sample_note": "note",
            "question_id": str(question),
            "question": f"Is {figure} more than {question} in {category}?",
            "gt_answer_details": "It is." if answer == "1" else "It is not.",
            "gt_answer": answer,
            "filename": f"./hallusion_bench/VD/chart/0_{figure}.png",
            "image": _picture(130 + figure),
        }

    return [row(0, 0, "0"), row(0, 1, "1"), row(1, 0, "1"), row(1, 1, "0"), row(0, 0, "1", "VS")]


# For each benchmark its rows, and the files of the hub's repository that hold them.
PUBLISHED = {
    "mathvista": (_mathvista, ["data/testmini-00000-of-00001-725687bf7a18d64b.parquet"]),
    "mathvision": (_mathvision, ["data/testmini-00000-of-00001.parquet"]),
    "mathverse": (_mathverse, ["testmini/testmini-00000-of-00001.parquet"]),
    "wemath": (_wemath, [f"data/testmini-0000{n}-of-00002.parquet" for n in range(2)]),
    "mmmu": (_mmmu, ["data/validation-00000-of-00001.parquet"]),
    "mmmu_pro_standard": (
        _mmmu_pro_standard,
        ["standard (10 options)/test-00000-of-00001.parquet"],
    ),
    "mmmu_pro_vision": (_mmmu_pro_vision, ["vision/test-00000-of-00001.parquet"]),
    "hallusion": (_hallusion, ["data/image-00000-of-00001.parquet"]),
}


def rows(name: str) -> list[dict]:
    """Return the rows of a benchmark."""
    return PUBLISHED[name][0]()


def write(root: pathlib.Path, name: str, changed: list[dict] | None = None) -> pathlib.Path:
    """Write a benchmark as the hub has it, and other splits beside it; return its folder."""
    given = rows(name) if changed is None else changed
    files = PUBLISHED[name][1]
    size = -(-len(given) // len(files))
    for number, file in enumerate(files):
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        part = given[number * size : (number + 1) * size]
        pq.write_table(pa.Table.from_pylist(part), path)
    other = root / "data" / "dev-00000-of-00001.parquet"
    other.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"another": ["split"]}), other)
    (root / "README.md").write_text("A card.\n")
    return root
