"""Writes docs/differences.md from the `# Differs:` comments of the six stages, so that the table never says what the code does not.

Run     python tests/differences.py            writes the table; tests/test_repository.py fails where it is out of date
"""
import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAGES = sorted(ROOT.glob("0?_*.py"))
HEAD = """# Where we differ from the papers and their code

`python tests/differences.py` makes this page from the comments that start with `# Differs:`. Each stands at the line where it happens.
"""


def comments(text):  # -> [(line, text, whether code stands before it)]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [(t.start[0], t.string.lstrip("# "), bool(t.line[:t.start[1]].strip())) for t in tokens if t.type == tokenize.COMMENT]


def place(tree, line):  # -> the function or method around a line; at module level the next thing that gets a name
    named = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    around = [n.name for n in sorted(named, key=lambda n: n.lineno) if n.lineno <= line <= n.end_lineno]
    if around:
        return ".".join(around[:2])
    following = next(n for n in tree.body if n.end_lineno >= line)
    return following.targets[0].id if isinstance(following, ast.Assign) else following.name


def differences(path):  # -> [(place, sentence)] of one stage
    text = path.read_text()
    tree, found, last = ast.parse(text), [], None
    for line, words, beside_code in comments(text):
        if words.startswith("Differs:"):
            found.append([place(tree, line), words.removeprefix("Differs:").strip()])
            last = line
        elif last == line - 1 and not beside_code:  # the comment goes on
            found[-1][1] += " " + words
            last = line
    return found


def page():
    parts = [HEAD]
    for path in STAGES:
        rows = [f"| `{where}` | {sentence[:1].upper()}{sentence[1:]} |" for where, sentence in differences(path)]
        if rows:
            parts.append("\n".join([f"\n## {path.name}\n", "| where | how |", "|---|---|", *rows]) + "\n")
    return "".join(parts)


if __name__ == "__main__":
    (ROOT / "docs" / "differences.md").write_text(page())
    print("docs/differences.md,", sum(len(differences(path)) for path in STAGES), "differences")
