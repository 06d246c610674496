"""An extension of griffe for the API page: names under "Args" get the types and defaults that the code states.

One line of "Args" may speak of several names; each of them becomes an entry.
"""

import griffe


class Fields(griffe.Extension):
    """Completes the parameters in the docstrings of classes and functions."""

    def on_object(self, *, obj: griffe.Object, **kwargs):
        if obj.docstring is None or not (obj.is_class or obj.is_function):
            return
        for section in obj.docstring.parsed:
            if section.kind is griffe.DocstringSectionKind.parameters:
                section.value = [entry for several in section.value for entry in _one_by_one(obj, several)]


def _one_by_one(obj, several):
    first, *others = several.name.split(", ")
    return [_complete(obj, first, several.description), *(_complete(obj, name, f"As `{first}`.") for name in others)]


def _complete(obj, name, description):
    """The entry of a name; what the code says nothing about, such as a keyword of **kwargs, has no type."""
    annotation = default = None
    if obj.is_function and name in obj.parameters:
        annotation, default = obj.parameters[name].annotation, obj.parameters[name].default
    elif obj.is_class and name in obj.members and obj.members[name].is_attribute:
        annotation, default = obj.members[name].annotation, obj.members[name].value
    elif obj.is_class and "__init__" in obj.members and name in obj.members["__init__"].parameters:
        parameter = obj.members["__init__"].parameters[name]
        annotation, default = parameter.annotation, parameter.default
    return griffe.DocstringParameter(name=name, description=description, annotation=annotation, value=default)
