"""What a page says about a class or a function: signature, parameters, docstring, source."""

import ast
import dataclasses
import html
import inspect
import re
import textwrap
from functools import cached_property
from importlib import import_module
from typing import NamedTuple

from fastcore.docments import docments
from nbdev.config import get_config
from nbdev.process import Processor

WIDTH = 88  # columns of a signature


class Parameter(NamedTuple):
    """One row of the table of a name."""

    name: str  # with its stars
    type: str  # as the source writes it, or nothing
    default: str  # as the source writes it, or nothing
    meaning: str  # the comment next to it, or nothing


def plain(member):
    """The function under a property, a bound method or a decorator."""
    for wrapper in ("fget", "func", "__func__"):
        member = getattr(member, wrapper, member)
    return inspect.unwrap(member)


def member_of(holder, name):
    """A member of a module or of a class; a property as such, not its value."""
    found = inspect.getattr_static(holder, name)
    return found if isinstance(found, property | cached_property) else getattr(holder, name)


def definition(obj):
    """The syntax tree of a class or a function."""
    return ast.parse(textwrap.dedent(inspect.getsource(obj))).body[0]


def annotation(node):
    """A type as the source writes it, without the quotes of a name that comes later."""
    return "" if node is None else ast.unparse(node).strip("'")


def default(node):
    """A default as the source writes it; of a dataclass's `field(...)`, what it makes."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "field":
        options = {option.arg: ast.unparse(option.value) for option in node.keywords}
        factory = options.get("default_factory")
        return f"{factory}()" if factory else options.get("default", "")
    return "" if node is None else ast.unparse(node)


def meanings(obj):
    """The comments next to parameters, by the names of the parameters."""
    found = docments(obj, args_kwargs=True)
    return {name: " ".join((comment or "").split()) for name, comment in found.items()}


def of_function(function):
    """The parameters of a function, and what it returns."""
    node = definition(function)
    comments = meanings(function)
    arguments = node.args
    positional = arguments.posonlyargs + arguments.args
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    rows = [("", *pair) for pair in zip(positional, defaults, strict=True)]
    if arguments.vararg:
        rows.append(("*", arguments.vararg, None))
    rows += [("", *pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        rows.append(("**", arguments.kwarg, None))
    parameters = [
        Parameter(
            stars + argument.arg,
            annotation(argument.annotation),
            default(value),
            comments.get(argument.arg, ""),
        )
        for stars, argument, value in rows
        if argument.arg not in ("self", "cls")
    ]
    returned = Parameter("", annotation(node.returns), "", comments.get("return", ""))
    return parameters, returned


def of_dataclass(cls):
    """The fields of a dataclass, those of its bases first."""
    fields = {}
    for part in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(part):
            continue
        comments = meanings(part)
        for node in definition(part).body:
            if isinstance(node, ast.AnnAssign):
                name = node.target.id
                fields[name] = Parameter(
                    name, annotation(node.annotation), default(node.value), comments.get(name, "")
                )
    return [fields[field.name] for field in dataclasses.fields(cls) if field.init]


def of(obj):
    """Parameters of a class or a function, what it returns, and whether it can be called."""
    nothing = Parameter("", "", "", "")
    if not inspect.isclass(obj):
        return *of_function(obj), True
    if dataclasses.is_dataclass(obj):
        return of_dataclass(obj), nothing, True
    if "__init__" in vars(obj):
        return of_function(plain(obj.__init__))[0], nothing, True
    return [], nothing, False


def signature(name, parameters, returned):
    """One line where it fits, else lines of several parameters."""
    shown = []
    for parameter in parameters:
        shown.append("=".join(filter(None, (parameter.name, parameter.default))))
    arrow = f" -> {returned.type}" if returned.type and returned.type != "None" else ""
    line = f"{name}({', '.join(shown)}){arrow}"
    if len(line) <= WIDTH:
        return line
    inside = textwrap.wrap(
        ", ".join(shown) + ",",
        WIDTH,
        initial_indent="    ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join([f"{name}(", *inside, f"){arrow}"])


def inline(text):
    """A comment as HTML: what stands between backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def code(text):
    """A piece of code as HTML, or nothing."""
    return f"<code>{html.escape(text, quote=False)}</code>" if text else ""


def explained(name, parameters, returned):
    """The parameters as an HTML table, and what is returned; nothing where there is neither."""
    returns = returned.meaning or returned.type not in ("", "None")
    if returns and not parameters:
        meaning = f": {inline(returned.meaning)}" if returned.meaning else ""
        return f'<p class="parameters"><em>returns</em> {code(returned.type)}{meaning}</p>'
    rows = [
        f"<tr><td>{code(row.name)}</td><td>{code(row.type)}</td>"
        f"<td>{code(row.default)}</td><td>{inline(row.meaning)}</td></tr>"
        for row in parameters
    ]
    if returns:
        rows.append(
            f"<tr><td><em>returns</em></td><td>{code(returned.type)}</td><td></td>"
            f"<td>{inline(returned.meaning)}</td></tr>"
        )
    if not rows:
        return ""
    return (
        f'<table class="table parameters" aria-label="Parameters of {html.escape(name)}">'
        "<thead><tr><th>name</th><th>type</th><th>default</th><th>meaning</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def source_link(obj):
    """Where the source of a class or a function is on the repository's site."""
    config = get_config()
    path = inspect.getsourcefile(obj)
    path = path[path.rindex(f"/{config.lib_path.name}/") + 1 :]
    line = inspect.getsourcelines(obj)[1]
    return f"{config.git_url}/blob/{config.branch}/{path}#L{line}"


def methods(cls):
    """Names of the public methods and properties that the body of a class defines, explained."""
    return [
        node.name
        for node in definition(cls).body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and ast.get_docstring(node)
    ]


def describe(name, member, level=3):
    """Markdown about a class, a function or a member of a class, with the methods of a class."""
    obj = member if inspect.isclass(member) else plain(member)
    parameters, returned, called = of(obj)
    link = source_link(obj)
    heading = name.replace("_", r"\_")  # underscores are part of the name, not bold type
    parts = [f"{'#' * level} {heading}"]
    of_name = f'<span class="visually-hidden"> of {name}</span>'
    parts.append(f'<p class="source-link"><a href="{link}">source{of_name}</a></p>')
    if isinstance(member, property | cached_property):
        parts.append("*property*")
    elif called:
        parts.append(f"```python\n{signature(name, parameters, returned)}\n```")
    if obj.__doc__:
        parts.append(inspect.cleandoc(obj.__doc__))
    parts.append(explained(name, parameters, returned))
    if inspect.isclass(obj):
        for method in methods(obj):
            parts.append(describe(f"{name}.{method}", member_of(obj, method), level + 1))
    return "\n\n".join(filter(None, parts))


class ExplainNames(Processor):
    """Fills the cells that nbdev makes for exported names; no cell of a notebook is run."""

    def begin(self):
        modules = [
            cell.directives_["default_exp"][0]
            for cell in self.nb.cells
            if "default_exp" in getattr(cell, "directives_", {})
        ]
        package = get_config().lib_path.name
        self.module = import_module(f"{package}.{modules[0]}") if modules else None

    def cell(self, cell):
        asked = re.search(r"^show_doc\(([\w.]+)\)", cell.source or "", flags=re.M)
        if cell.cell_type != "code" or not asked or self.module is None:
            return
        holder, _, last = asked[1].rpartition(".")
        if holder.startswith("_"):  # a method of a private class
            cell["source"] = None
            return
        obj = self.module
        for part in filter(None, holder.split(".")):
            obj = getattr(obj, part)
        text = describe(asked[1], member_of(obj, last))
        shown = {"output_type": "display_data", "data": {"text/markdown": text}, "metadata": {}}
        cell["outputs"] = [shown]
