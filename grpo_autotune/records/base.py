"""The base of every record."""

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Base of every record: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Document(Frozen):
    """Base of what is a whole JSON document, whose `schema` names its kind and version."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True, protected_namespaces=())

    @classmethod
    def schema_name(cls) -> str:
        """The schema of the documents that this version writes, the only one that it reads."""
        return str(cls.model_fields["schema_"].default)
