"""Kill a run at every call that changes the disk: the output is always whole."""

from __future__ import annotations

import os

import pytest
from runs import (
    CASES,
    OTHER,
    Case,
    check_crashed,
    check_whole,
    content,
    count,
    found,
    prepare,
    without_renameat2,
    write,
)

from lorabridge.actions.clean import clean
from lorabridge.errors import OutputError
from lorabridge.files.fsio import Staging, find_staging


def killed(seam, number: int, torn: bool, run) -> None:
    """Run in a child that dies at one call, before it or (a write) in the middle of it."""
    child = os.fork()
    if child == 0:

        def die(at, name, args):
            if at == number:
                if torn and name == "pwrite":
                    os.pwrite(args[0], args[1][: len(args[1]) // 2], args[2])
                os._exit(9)

        try:
            seam.reset()
            seam.at = die
            run()
        except BaseException:
            os._exit(3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_kill_at_any_call_leaves_the_old_or_the_new_output(tmp_path, case, seam):
    without_renameat2(case, seam)
    calls = count(tmp_path, case, seam)
    assert calls > 20
    standing = set()
    names = [name for name, _ in seam.log]
    for number in range(1, calls + 1):
        for torn in (False, True) if names[number - 1] == "pwrite" else (False,):
            root = prepare(tmp_path, case, 10 * number + torn)
            killed(seam, number, torn, lambda root=root: write(root, case))
            check_crashed(root, case)
            assert len(find_staging(root)) <= 1
            assert not any(area.held for area in find_staging(root))
            report = clean(root, dry_run=False)
            assert len(report.removed) <= 1
            standing.add(check_whole(root, case))
            assert sorted(p.name for p in root.iterdir() if p.name.startswith(".")) == []
    assert standing == {"old" if case.old else "none", "new"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_next_run_succeeds_after_a_kill_at_any_call(tmp_path, case, seam):
    without_renameat2(case, seam)
    for number in range(1, count(tmp_path, case, seam) + 1):
        root = prepare(tmp_path, case, number)
        killed(seam, number, False, lambda root=root: write(root, case))
        if not case.old and (root / "adapter").exists():  # the killed run had published it
            with pytest.raises(OutputError, match="exists"):
                write(root, case)
        else:
            write(root, case)
        assert check_whole(root, case) == "new"
        assert not find_staging(root)


@pytest.mark.parametrize("case", [c for c in CASES if c.old], ids=str)
def test_another_run_after_a_kill_wins_and_clean_does_not_undo_it(tmp_path, case, seam):
    without_renameat2(case, seam)
    for number in range(1, count(tmp_path, case, seam) + 1):
        root = prepare(tmp_path, case, number)
        killed(seam, number, False, lambda root=root: write(root, case))
        later = Case(case.directory, case.old, case.renameat2, digest=OTHER)
        write(root, later, "later", overwrite=True)
        clean(root, dry_run=False)
        assert found(root, case) == content(case, "later")
        assert not find_staging(root)


def test_a_kill_while_a_companion_is_dropped_leaves_a_whole_output(tmp_path, seam):
    case = Case(False, True)

    def run(root):
        with Staging(root / "adapter", digest=case.digest, overwrite=True, directory=False) as staging:
            file = staging.create("adapter")
            file.write(0, content(case, "new")["adapter"])
            file.close()
            staging.drop("adapter.json")
            staging.commit()

    root = prepare(tmp_path, case, 0)
    seam.reset()
    run(root)
    assert found(root, case) == {"adapter": content(case, "new")["adapter"]}
    for number in range(1, len(seam) + 1):
        root = prepare(tmp_path, case, number)
        killed(seam, number, False, lambda root=root: run(root))
        clean(root, dry_run=False)
        assert found(root, case) in (content(case, "old"), {"adapter": content(case, "new")["adapter"]})
