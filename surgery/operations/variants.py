"""Methods of one operation (or of healing) as classes: a discriminated union on the field `method`.

    class Merge(Variants, WeightRewrite):  # shared by all methods: fields, `problems`, `plan`
        op: Literal["merge"] = "merge"
        method: str = Field(description="How heads are merged.")

    class Mean(Merge):
        \"\"\"The mean of the group.\"\"\"
        method: Literal["mean"] = "mean"  # a default value: this method is used if a recipe names none

    class Random(Merge):
        \"\"\"New random heads.\"\"\"
        method: Literal["random"]
        seed: int = Field(0, description="Seed of the draw.")

    METHODS = Merge.union(Mean, Random)

After `union`, the shared class stands for all methods. `Merge(method="random", seed=3)` and `Merge.model_validate`
return a `Random`, a field of type `Merge` accepts every method, and its JSON Schema is a oneOf with a discriminator.
A new method is one class, and its name in the call of `union`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_args

from pydantic import (
    BaseModel,
    GetCoreSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic_core import (
    CoreSchema,
    InitErrorDetails,
    PydanticCustomError,
    PydanticUndefined,
    core_schema,
)

from surgery.errors import any_of

OTHER_METHOD = "other_method"  # type of the error for a field that belongs to another method
KNOWN = get_args(core_schema.ErrorType)  # types of errors for which pydantic has messages
LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


class Variants(BaseModel):
    """Base of a class whose methods are its subclasses (see the module's docstring).

    A field of another method is refused by an error that names that method. There is one exception: records of earlier
    versions hold such a field with its default, or with null, if it was not set. With such a value it is ignored.

    null in a field with another default means this default. A field that was not set is recorded as null there. In
    earlier versions the defaults were only in the method's code, and this keeps records and their hashes the same.
    """

    METHODS: ClassVar[dict[str, type[Variants]]] = {}
    # Fields that earlier versions lack. They are recorded only if somebody set them, so that an earlier run resumes.
    LATER: ClassVar[tuple[str, ...]] = ()
    RECORDED_AFTER: ClassVar[dict[str, tuple[str, ...]]] = {}  # field -> fields that follow it in a record

    if TYPE_CHECKING:
        method: str

    def __new__(cls, **fields: Any) -> Self:
        return super().__new__(cls.variant(fields.get("method")) if cls.is_union() else cls)  # type: ignore[misc]

    @classmethod
    def union(cls, *methods: type[Variants]) -> dict[str, type[Variants]]:
        """Make this class stand for its methods, and return them by name, in this order (also `cls.METHODS`)."""
        cls.METHODS = {method.own_method(): method for method in methods}
        cls.model_rebuild(force=True)
        return cls.METHODS

    @classmethod
    def own_method(cls) -> str:
        """The name of this method."""
        return get_args(cls.model_fields["method"].annotation)[0]

    @classmethod
    def is_union(cls) -> bool:
        """Whether this class stands for its methods. False: it is one of them."""
        return bool(vars(cls).get("METHODS"))

    @classmethod
    def default_method(cls) -> str | None:
        """The method that is used if none is named; None: a method must be named."""
        names = (name for name, method in cls.METHODS.items() if not method.model_fields["method"].is_required())
        return next(names, None)

    @classmethod
    def variant(cls, method: object) -> type[Variants]:
        """The class of a method by name. An unknown name gives the default or the first class, which refuses it."""
        known = method if isinstance(method, str) and method in cls.METHODS else cls.default_method()
        return cls.METHODS[known or next(iter(cls.METHODS))]

    @classmethod
    def readers(cls, key: str) -> list[str]:
        """The methods that have this field."""
        return [name for name, method in cls.METHODS.items() if key in method.model_fields]

    @classmethod
    def misplaced(cls, keys: list[str]) -> list[tuple[str, str]]:
        """Errors for fields of other methods: pairs of a field, and a sentence on this field or on several fields."""
        method = cls.own_method()
        return [(key, f"{key} is for method: {any_of(cls.readers(key))}, not {method}") for key in keys]

    @classmethod
    def strangers(cls, fields: Collection[str]) -> list[str]:
        """Those among the given fields that another method has and this method lacks."""
        known = dict.fromkeys(key for method in cls.METHODS.values() for key in method.model_fields)
        return [key for key in known if key in fields and key not in cls.model_fields]

    @classmethod
    def unset(cls, key: str) -> list[Any]:
        """Values that a record may hold for an unset field of other methods; [] if these methods require it."""
        values = []
        for method in cls.readers(key):
            variant = cls.METHODS[method]
            field = variant.model_fields[key]
            if not field.is_required():
                values.append(None if key in variant._null_is_default() else field.get_default())
        return values

    def identity(self) -> dict[str, Any]:
        """The record, with other methods' fields as earlier versions recorded them. Resume hashes are made from it.

        Fields that earlier versions lack, `LATER` of every method that has them, are not added.
        """
        others = [key for key in self.strangers(keys_of(type(self))) if not self._is_later(key)]
        unset = {key: values[0] for key in others if (values := self.unset(key))}
        return self.model_dump(mode="json") | unset

    @classmethod
    def _is_later(cls, key: str) -> bool:
        """Whether earlier versions had this field in no method."""
        return all(key in cls.METHODS[method].LATER for method in cls.readers(key))

    @classmethod
    def _null_is_default(cls) -> set[str]:
        """Fields that accept null and have another default."""
        fields = cls.model_fields.items()
        return {
            name
            for name, field in fields
            if type(None) in get_args(field.annotation) and field.default not in (None, PydanticUndefined)
        }

    @model_validator(mode="wrap")
    @classmethod
    def _of_one_method(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, dict):
            return handler(data)
        nulls, strangers = cls._null_is_default(), cls.strangers(data)
        wrong = [key for key in strangers if not any(_same(data[key], value) for value in cls.unset(key))]
        own = {
            key: value for key, value in data.items() if key not in strangers and not (value is None and key in nulls)
        }
        faults: list[InitErrorDetails] = [
            {"type": PydanticCustomError(OTHER_METHOD, "{text}", {"text": text}), "loc": (key,), "input": data[key]}
            for key, text in (cls.misplaced(wrong) if wrong else ())
        ]
        try:
            made = handler(own)
        except ValidationError as error:
            if not faults:
                raise
            faults += [_again(each) for each in error.errors(include_url=False)]
        else:
            if not faults:
                return made
        raise ValidationError.from_exception_data(cls.__name__, faults)

    @model_serializer(mode="wrap")
    def _record(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unset = self._null_is_default() - self.model_fields_set
        left_out = set(self.LATER) - self.model_fields_set
        data = {key: None if key in unset else value for key, value in handler(self).items() if key not in left_out}
        followers = {key for keys in self.RECORDED_AFTER.values() for key in keys}
        order = (name for key in data if key not in followers for name in (key, *self.RECORDED_AFTER.get(key, ())))
        return {key: data[key] for key in order if key in data}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if not cls.is_union():
            return handler(source)

        def with_method(data: Any) -> Any:
            default = cls.default_method()
            return {"method": default, **data} if default and isinstance(data, dict) else data

        names = any_of([repr(name) for name in cls.METHODS])
        union = core_schema.tagged_union_schema(
            {name: handler.generate_schema(method) for name, method in cls.METHODS.items()},
            "method",
            custom_error_type="unknown_method",
            custom_error_message=f"method should be {names}",
        )
        return core_schema.no_info_before_validator_function(with_method, union)


def keys_of(cls: type[BaseModel]) -> list[str]:
    """Every key of a class or of one of its methods; keys that all methods share come first."""
    methods = cls.METHODS.values() if issubclass(cls, Variants) else ()
    return list(dict.fromkeys([*cls.model_fields, *(key for method in methods for key in method.model_fields)]))


def own_keys(cls: type[Variants]) -> list[str]:
    """The fields of a method that not all methods of its union have."""
    common = set.intersection(*(set(method.model_fields) for method in cls.METHODS.values()))
    return [key for key in cls.model_fields if key not in common]


def inline_schema(cls: type[BaseModel]) -> dict[str, Any]:
    """JSON Schema of a class, without references.

    The schema of a union has `properties` with the keys of all methods. It also has a oneOf with one schema for each
    method, with the method's own defaults and descriptions; `method` is the discriminator.
    """
    if not (issubclass(cls, Variants) and cls.is_union()):
        return cls.model_json_schema()
    methods = {name: method_schema(method) for name, method in cls.METHODS.items()}
    required = set.intersection(*(set(schema.get("required", [])) for schema in methods.values()))
    return {
        "title": cls.__name__,
        "description": first_words(cls),
        "type": "object",
        "properties": {key: _joined(key, cls, methods) for key in keys_of(cls)},
        "required": [key for key in keys_of(cls) if key in required],
        "additionalProperties": False,
        "discriminator": {"propertyName": "method"},
        "oneOf": list(methods.values()),
    }


def describe_method(cls: type[Variants]) -> dict[str, Any]:
    """A method and its own fields: {"description", "fields": {name: JSON Schema}, "required": [names]}."""
    schema = method_schema(cls)
    fields = {key: schema["properties"][key] for key in own_keys(cls) if key != "method"}
    required = [key for key in schema.get("required", []) if key in fields]
    return {"description": schema["description"], "fields": fields, "required": required}


def method_schema(cls: type[Variants]) -> dict[str, Any]:
    """JSON Schema of one method."""
    schema = _with_standard_limits(cls.model_json_schema())
    schema["description"] = schema["properties"]["method"]["description"] = first_words(cls)
    return schema


def _with_standard_limits(schema: Any) -> Any:
    """A schema in which the limits of optional numbers have JSON Schema's names, where pydantic leaves its own."""
    if isinstance(schema, dict):
        return {LIMITS.get(key, key): _with_standard_limits(value) for key, value in schema.items()}
    return [_with_standard_limits(value) for value in schema] if isinstance(schema, list) else schema


def first_words(cls: type[BaseModel]) -> str:
    """The first paragraph of a class's docstring, in one line."""
    return " ".join((cls.__doc__ or "").split("\n\n")[0].split())


def _joined(key: str, cls: type[Variants], methods: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The schema of one field, joined from the schemas of the methods that have it."""
    fields_by_method = {
        name: schema["properties"][key] for name, schema in methods.items() if key in schema["properties"]
    }
    if key == "method":
        default = cls.default_method()
        described = {"title": "Method", "type": "string", "enum": list(methods)}
        text = cls.model_fields["method"].description
        return described | ({"default": default} if default else {}) | ({"description": text} if text else {})
    first, *others = fields_by_method.values()
    if all(other == first for other in others):
        text = first.get("description", "")
        if len(fields_by_method) < len(methods):
            text = f"{', '.join(fields_by_method)}: {_continued(text)}"
        return first | ({"description": text} if text else {})
    by_text: dict[str, list[str]] = {}
    for name, field in fields_by_method.items():
        by_text.setdefault(field.get("description", ""), []).append(name)
    sentences = [f"{', '.join(names)}: {_continued(words)}" for words, names in by_text.items()]
    text = "; ".join([*(words.removesuffix(".") for words in sentences[:-1]), sentences[-1]])
    bare = [
        {name: value for name, value in field.items() if name not in ("description", "default", "title")}
        for field in fields_by_method.values()
    ]
    alternatives = [field for index, field in enumerate(bare) if field not in bare[:index]]
    values = [field.get("default") for field in fields_by_method.values()]
    shared = {"default": values[0]} if all(_same(value, values[0]) for value in values) else {}
    kinds = alternatives[0] if len(alternatives) == 1 else {"anyOf": alternatives}
    return {"title": first["title"], **kinds, **shared, "description": text}


def _continued(sentence: str) -> str:
    """A sentence with a small first letter, to follow a colon; words in capitals (MLP, JSONL) are kept."""
    first, rest = sentence[:1], sentence[1:]
    return sentence if rest[:1].isupper() else first.lower() + rest


def _same(left: Any, right: Any) -> bool:
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def _again(error: Any) -> InitErrorDetails:
    """An error of pydantic, in the form in which it can be raised again with other errors."""
    kind: Any = error["type"]
    if kind not in KNOWN:
        kind = PydanticCustomError(kind, "{text}", {"text": error["msg"]})
    return {"type": kind, "loc": error["loc"], "input": error["input"], "ctx": error.get("ctx", {})}
