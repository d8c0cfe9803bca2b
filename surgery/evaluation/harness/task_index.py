"""lm-eval's index of its tasks, groups and tags: what a name or a YAML file stands for. No data are read here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from surgery.errors import SettingError, nearest


def manager_of(metadata: str, folder: str | None = None) -> Any:
    """lm-eval's index of its tasks, which takes seconds to make.

    Args:
        metadata: JSON of what tasks are told.
        folder: a folder with more YAML files of tasks.
    """
    files = sorted(Path(folder).glob("*.yaml")) if folder else ()
    return _manager(metadata, folder, tuple((file.name, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=2)
def _manager(metadata: str, folder: str | None, files: tuple[tuple[str, int], ...]) -> Any:
    """The index; `files` has names and times of the folder's files, which may be mended in this process."""
    from lm_eval.tasks import TaskManager

    return TaskManager(metadata=json.loads(metadata), include_path=folder)


def group_of_file(name: str) -> str:
    """The name of the group that a file defines; "" for a task's file and for what is no file."""
    entry = (_entry_of_file(Path(name)) if _is_file(name) else None) or {}
    group = "" if "class" in entry else entry.get("group")  # lm-eval takes a file with a class for a task
    return group if isinstance(group, str) else ""


def folder_of_groups(names: Sequence[str]) -> str | None:
    """The folder of the files of groups among names.

    lm-eval reads a task from the path of its file, but not a group. A group is read from the index of its folder, so
    it may name the tasks of other files there.

    Raises:
        SettingError: the folders are two, of which the command `lm_eval` takes one.
    """
    first: dict[str, str] = {}
    for name in names:
        if group_of_file(name):
            first.setdefault(str(Path(name).parent.resolve()), name)
    if len(first) > 1:
        one, other, *_ = first.values()
        what = f"{one} and {other} are groups of tasks in two folders, and the command lm_eval takes one"
        raise SettingError(what, fix="put them into one folder, or ask for them one at a time")
    return next(iter(first), None)


def refuse_other_group(index: dict[str, Any], name: str, group: str) -> None:
    """Raise unless the index has the group of this file under its name."""
    path = getattr(index.get(group), "yaml_path", None)
    if path is not None and path.resolve() == Path(name).resolve():
        return
    if Path(name).suffix != ".yaml":
        raise SettingError(f"lm-eval reads a group from a file NAME.yaml alone: {name}", fix="rename the file")
    if path is None:
        what = f"lm-eval does not find the group {group} of {name}"
        raise SettingError(what, fix="check the file: an `include` may be missing, or a task may have that name")
    raise SettingError(f"the group {group} of {name} is also that of {path}", fix="give it another name")


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml")


def refuse_unknown(names: Sequence[str], manager: Any = None) -> None:
    """Raise for names that are neither tasks of lm-eval nor files, all of them in one error, and for groups in two
    folders. No data are read.
    """
    known, faults = (manager or manager_of("{}")).all_tasks, []
    folder_of_groups(names)
    for name in names:
        if name in known:
            continue
        if _is_file(name):
            if not Path(name).is_file():
                faults.append(SettingError(f"there is no task file {name}", fix="write the path of a YAML task"))
            continue
        close = nearest(name, known)
        exists = f"{len(known):,} tasks and groups; `lm_eval ls tasks` lists them"
        fix = f"did you mean {close!r}?" if close else "a name of that list, or a YAML file"
        faults.append(SettingError(f"lm-eval has no task {name!r}", exists=exists, fix=fix))
    if faults:
        first, *rest = faults
        raise SettingError(first.what, exists=first.exists, fix=first.fix, others=tuple(rest))


def row_names(names: Sequence[str]) -> set[str] | None:
    """The tasks and groups that names and files stand for; None where a file does not say. No data are read."""
    index, rows = manager_of("{}", folder_of_groups(names)).task_index, set()
    for name in names:
        entry = name if name in index else _entry_of_file(Path(name))
        try:
            if group := group_of_file(name):
                refuse_other_group(index, name, group)
                entry = group
            rows |= _members(entry, index)
        except (_UnclearFileError, SettingError):  # the tasks are refused when they are read
            return None
    return rows


class _UnclearFileError(Exception):
    """The file of a task or group does not say in strings what it names."""


def _members(entry: Any, index: dict[str, Any], group: str = "", around: tuple[int, ...] = ()) -> set[str]:
    """A task, or a group or tag with all that is in it, as lm-eval names them.

    Args:
        entry: its name, or a mapping with the key `task` or `group`.
        group: the group that it is in; lm-eval puts this before names that are not in its index.
        around: ids of the mappings that the entry lies in, since a file may refer to itself.

    Raises:
        _UnclearFileError: the entry has another form, such as the older spelling of tags as a list.
    """
    inline = entry if isinstance(entry, dict) else {}
    name = inline.get("group") or inline.get("task") if inline else entry
    if not isinstance(name, str) or id(entry) in around:
        raise _UnclearFileError
    known = index.get(name)
    if known is None:
        members, own = inline.get("task") if "group" in inline else (), f"{group}::{name}" if group else str(name)
    elif known.kind.name == "TAG":
        return set(known.tags)
    else:
        members, own = (known.cfg or {}).get("task") if known.kind.name == "GROUP" else (), name
    listed = members if isinstance(members, list) else ()
    inside = (*around, id(inline)) if inline else around
    return {own}.union(*(_members(member, index, own, inside) for member in listed))


class _PlainLoader(yaml.SafeLoader):
    """Reads a task's file without running what it names."""


_PlainLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def _entry_of_file(file: Path) -> dict[str, Any] | None:
    """The keys `task`, `group` and `class` of a task's file; None where it has none."""
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), _PlainLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    keys = {key: data[key] for key in ("task", "group", "class") if key in data} if isinstance(data, dict) else {}
    return keys or None
