"""Objects that a config names: `module:attribute`, or `path/to/file.py:attribute`."""

import importlib
import importlib.util
import sys
import traceback
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any

from tokencredit.errors import TokenCreditError, shown

_FOLDERS: list[Path] = []  # where files are looked up besides the current folder


def add_search_folder(folder: Path) -> None:
    """Look up modules and files in `folder` too, such as the folder of a config; installed modules come first."""
    folder = folder.resolve()
    if folder not in _FOLDERS:
        _FOLDERS.append(folder)


def load_attribute(name: str, what: str) -> Any:
    """Load the object that a config names.

    Modules are found where Python finds them, then in the current folder, then in the folders of `add_search_folder`.
    A name whose module part ends in `.py` is a file, relative to the current folder or to one of those.

    Args:
      name: `module:attribute` or `path/to/file.py:attribute`; the attribute may have dots.
      what: what the object is for, such as "the reward"; the error begins with it.

    Raises:
      TokenCreditError: the name has another form, the module does not exist or fails while it is imported (with the
        line of the failure), or it has no such attribute.
    """
    if not isinstance(name, str):
        raise TokenCreditError(f"{what} is module:attribute, got {shown(name)}")
    source, colon, attribute = name.rpartition(":")
    if not (colon and source and attribute) or "\0" in name:
        raise TokenCreditError(
            f"{what} is module:attribute, got {shown(name)}",
            hint="for example my_rewards:length or ./my_rewards.py:length",
        )
    module = _load_file(source, name, what) if source.endswith(".py") else _load_module(source, name, what)
    loaded: Any = module
    for part in attribute.split("."):
        try:
            loaded = getattr(loaded, part)
        except AttributeError as error:
            where = getattr(module, "__file__", None) or "built into Python"
            raise TokenCreditError(
                f"cannot load {what} {shown(name)}: {shown(source)} ({where}) has no {shown(attribute)}",
                hint=_spelling_hint(source, attribute),
            ) from error
    return loaded


def _spelling_hint(source: str, attribute: str) -> str:
    if source.endswith(".py"):
        return "check the spelling"
    return (
        f"check the spelling; if this is not your file, another module has its name: write ./{source}.py:{attribute} "
        "for a file"
    )


def load_function(name: str, what: str) -> Any:
    """`load_attribute`, for an object that must be callable."""
    loaded = load_attribute(name, what)
    if not callable(loaded):
        raise TokenCreditError(f"{what} must be a function, but {shown(name)} is a {type(loaded).__name__}")
    return loaded


def _load_module(source: str, name: str, what: str) -> ModuleType:
    if not all(part.isidentifier() for part in source.split(".")):
        raise TokenCreditError(
            f"{what} is module:attribute, got {shown(name)}", hint="a file is written as ./path/to/file.py:attribute"
        )
    for folder in (Path.cwd(), *_FOLDERS):
        if str(folder) not in sys.path and (str(folder) != str(Path.cwd()) or "" not in sys.path):
            sys.path.append(str(folder))
            importlib.invalidate_caches()
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing == source or source.startswith(f"{missing}."):
            raise TokenCreditError(
                f"cannot load {what} {shown(name)}: No module named {missing!r}",
                hint="looked in sys.path, in the current folder and beside the config; is it installed, or elsewhere?",
            ) from error
        raise _import_error(source, name, what, error) from error
    except (Exception, SystemExit) as error:
        raise _import_error(source, name, what, error) from error


def _load_file(source: str, name: str, what: str) -> ModuleType:
    path = _find_file(Path(source).expanduser())
    if path is None:
        places = ", ".join(str(folder) for folder in (Path.cwd(), *_FOLDERS))
        raise TokenCreditError(f"cannot load {what} {shown(name)}: no file {source!r}", hint=f"looked in {places}")
    # One module per file, under a name that worker processes derive too.
    module_name = f"{path.stem}_{blake2b(str(path).encode(errors='surrogateescape'), digest_size=6).hexdigest()}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # what it imports from its own folder
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise _import_error(source, name, what, error) from error
    return module


def _find_file(path: Path) -> Path | None:
    for folder in (Path.cwd(), *_FOLDERS):
        try:
            if (folder / path).is_file():
                return (folder / path).resolve()
        except (OSError, ValueError):  # a name that no file can have
            return None
    return None


def _import_error(source: str, name: str, what: str, error: BaseException) -> TokenCreditError:
    """The error for a module that exists and fails while it is imported: its own message and line."""
    if isinstance(error, SyntaxError):
        place = f"{error.filename}, line {error.lineno}"
    else:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
        place = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else source
    message = " ".join(str(error).split()) or "(no message)"
    return TokenCreditError(
        f"cannot load {what} {shown(name)}: importing it raised {type(error).__name__}: {message} ({place})",
        hint="the module was found; fix the error in it, or install what it imports",
    )


def _is_users(filename: str) -> bool:
    return not filename.startswith("<frozen ") and filename != __file__ and Path(filename).parent.name != "importlib"
