"""Configs as frozen, typed records: a YAML mapping in, a plain mapping out, one line for whatever is wrong.

    class SearchSettings(Settings):
        section: ClassVar[str] = "search"          # for messages: `search.budget`

        budget: Count = 15
        policy: Literal["default", "random"] = "default"
        operators: Names = ("top",)

    settings = SearchSettings.read(given)          # TokenCreditError in one line, with the nearest key
    settings.to_mapping()                          # what YAML and JSON can hold, keys in order

Types are strict: True is not a number, and the text "3" is not 3. A section without content has its defaults. Checks
between fields are `model_validator`s that raise `TokenCreditError`. Pydantic does the checking; its errors never reach
the user.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
)

from tokencredit.errors import TokenCreditError, shown, unknown

Record = TypeVar("Record", bound="Settings")

LARGEST = 2**31 - 1
MOST_VALUES = 10_000  # in one config; an alias that is used often counts as often
DEEPEST = 50  # levels of a config


class Words(NamedTuple):
    """Metadata of a type: what it accepts, in the words of an error message."""

    text: str


def _check_text(value: str) -> str:
    if value.strip() == "" or "\0" in value:
        raise ValueError
    return value


def _check_finite(value: int | float) -> int | float:
    if not is_number(value):
        raise ValueError
    return value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_block(value: Any) -> Any:
    return {} if value is None else value


def _as_names(value: Any) -> Any:
    return (value,) if isinstance(value, str) else _as_tuple(value)


Text = Annotated[str, AfterValidator(_check_text), Words("a text")]
Count = Annotated[int, Field(ge=1, le=LARGEST), Words("a whole number of at least 1")]
Seed = Annotated[int, Field(ge=0, lt=2**32), Words("a whole number")]
Number = Annotated[int | float, AfterValidator(_check_finite), Words("a number")]  # an int stays an int
Texts = Annotated[tuple[Text, ...], BeforeValidator(_as_tuple), Words("a list of texts")]
Block = Annotated[dict[str, Any], BeforeValidator(_as_block), Words("a mapping")]  # null means an empty one
Names = Annotated[tuple[Text, ...], BeforeValidator(_as_names), Words("a name or a list of names")]


_STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


class Settings(BaseModel):
    """A frozen record of settings. Subclasses declare their keys as fields.

    Args are keyword arguments of the fields' names; wrong ones raise `TokenCreditError`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", **_STRICT)

    section: ClassVar[str] = ""
    """The section of the file that holds the keys: the prefix of their names in messages."""
    key_kind: ClassVar[str] = ""
    """How messages call a key, if not "config key" or "key of `section`"."""

    def __init__(self, **values: Any) -> None:
        for name, kind in self.sections().items():
            if values.get(name) is not None:
                values[name] = kind.read(values[name])
            elif type(None) not in get_args(type(self).model_fields[name].annotation):
                values.pop(name, None)  # `evaluation:` with nothing below it: the defaults
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _first_error(type(self), values, error) from None

    @classmethod
    def read(cls: type[Record], given: Any) -> Record:
        """Read a mapping, as YAML gives it.

        Raises:
          TokenCreditError: it is not a mapping, a key is unknown or missing, or a value has another type; the error
            names the key, the value and what is accepted.
        """
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            name = f"`{cls.section}`" if cls.section else "a config"
            raise TokenCreditError(f"{name} must be a mapping, got {shown(given)}")
        for key in given:
            if not isinstance(key, str) or key not in cls.model_fields:
                raise cls.unknown_key(key)
        return cls(**given)

    @classmethod
    def sections(cls) -> dict[str, type["Settings"]]:
        """The fields that are records themselves, also where they may be null."""
        kinds = {name: (field.annotation, *get_args(field.annotation)) for name, field in cls.model_fields.items()}
        return {
            name: part
            for name, parts in kinds.items()
            for part in parts
            if isinstance(part, type) and issubclass(part, Settings)
        }

    @classmethod
    def unknown_key(cls, key: object) -> TokenCreditError:
        """The error for a key that is not a field; subclasses may add a hint."""
        kind = f"key of `{cls.section}`" if cls.section else "config key"
        return unknown(cls.key_kind or kind, key, cls.model_fields)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The defaults as a plain mapping; keys that must be given are left out."""
        fields = {name: field for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: _as_plain(field.get_default()) for name, field in fields.items()}

    def to_mapping(self) -> dict[str, Any]:
        """The settings as YAML and JSON hold them: nested records are mappings, tuples are lists."""
        return {name: _as_plain(getattr(self, name)) for name in type(self).model_fields}

    def replace(self: Record, **changes: Any) -> Record:
        """A checked copy with some fields changed."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | changes)


def _as_plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.to_mapping()
    if isinstance(value, Mapping):
        return {key: _as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_plain(item) for item in value]
    return value


def _first_error(kind: type[Settings], values: Mapping[str, Any], error: ValidationError) -> TokenCreditError:
    """The first of pydantic's errors in the words of this package."""
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, TokenCreditError):  # of a nested record, or of a check between fields
        return cause
    key = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return kind.unknown_key(key)
    if first["type"] == "missing":
        return TokenCreditError(f"`{kind.section}` needs `{key}`" if kind.section else f"`{key}` is missing")
    if key not in kind.model_fields:
        return TokenCreditError(first["msg"])
    return wrong_value(f"{kind.section}.{key}".lstrip("."), values.get(key), field_type(kind, key))


def field_type(kind: type[Settings], key: str) -> Any:
    """The annotation of a field, with its metadata."""
    field = kind.model_fields[key]
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a value is of the type `hint`; a type that pydantic cannot check accepts everything."""
    if isinstance(value, int) and not is_whole(int(value), -LARGEST):
        return False
    try:
        TypeAdapter(hint, config=_STRICT).validate_python(value)
    except ValidationError:
        return False
    except PydanticUserError:
        return True
    return True


def wrong_value(path: str, value: Any, hint: Any) -> TokenCreditError:
    """The error for a value that is not of the type `hint`."""
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    if choices and isinstance(value, str):
        return unknown(f"`{path}`" if "." in path else path, value, map(str, choices))
    return TokenCreditError(f"`{path}` must be {words_of(hint)}, got {shown(value)}")


_WORDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def words_of(hint: Any) -> str:
    """A type in the words of a config, such as "a whole number from 1 to 8, or null"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        spoken = [number for number, item in enumerate(hint.__metadata__) if isinstance(item, Words)]
        if not spoken:
            return words_of(arguments[0]) + _bounds(hint.__metadata__)
        return hint.__metadata__[spoken[-1]].text + _bounds(hint.__metadata__[spoken[-1] + 1 :])
    if origin in (Union, UnionType):
        parts = [words_of(part) for part in arguments if part is not type(None)]
        return " or ".join(dict.fromkeys(parts)) + (", or null" if type(None) in arguments else "")
    if origin is Literal:
        return " or ".join(map(str, arguments))
    kind = origin or hint
    if kind in _WORDS:
        return _WORDS[kind]
    if isinstance(kind, type) and issubclass(kind, Mapping | Settings):
        return "a mapping"
    return "a list" if isinstance(kind, type) and issubclass(kind, list | tuple) else "of another type"


def _bounds(metadata: Iterable[Any]) -> str:
    words = ((Ge, "ge", "of at least"), (Gt, "gt", "above"), (Le, "le", "of at most"), (Lt, "lt", "below"))
    items = [part for entry in metadata for part in getattr(entry, "metadata", (entry,))]
    said = [
        f" {text} {getattr(item, name):,}" for item in items for kind, name, text in words if isinstance(item, kind)
    ]
    return " and".join(said)


def is_whole(value: Any, low: int, high: int = LARGEST) -> bool:
    """Tell whether a value is an integer between two bounds; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number; True and False are not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def plain_value(value: Any, path: str = "the config") -> Any:
    """Copy a config into what JSON and YAML can hold: mappings with text keys, lists, texts, numbers, booleans, null.

    Raises:
      TokenCreditError: another type, nesting of more than 50 levels (an alias that contains itself), or more than
        10,000 values (an alias of aliases).
    """
    return _copy_plain(value, path, 0, [0])


def _copy_plain(value: Any, path: str, depth: int, seen: list[int]) -> Any:
    seen[0] += 1
    if depth > DEEPEST:
        raise TokenCreditError(f"{path.partition('.')[0]} is nested more than {DEEPEST} levels deep")
    if seen[0] > MOST_VALUES:
        raise TokenCreditError(f"the config holds more than {MOST_VALUES:,} values")
    if isinstance(value, PurePath):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        keys = [_text_key(key, path) for key in value]
        return {key: _copy_plain(value[key], f"{path}.{key}", depth + 1, seen) for key in keys}
    if isinstance(value, list | tuple):
        return [_copy_plain(item, path, depth + 1, seen) for item in value]
    raise TokenCreditError(f"{path} holds {shown(value)}, which YAML reads as {type(value).__name__}", hint="quote it")


def _text_key(key: Any, path: str) -> str:
    if not isinstance(key, str):
        raise TokenCreditError(f"{path} has the key {shown(key)}; a key must be a text", hint="quote it")
    return key
