"""Rules: which version, or which other model, a request goes to by its input. CEL expressions over a few facts.

An expression is checked when it is set, compiled when a route is applied, and asked for each request. Facts that are
one entry of a map (a header, a metadata field, a modality) become variables of their own: a missing one reads as the
empty text instead of failing, and no map is built for a request. So do simple tests of texts. Knows no HTTP, no body
format and no instance.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import msgspec

from turnout.core.split import SplitTable, Spread
from turnout.events.route import Rule, Split

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import cel

#: A model has at most so many rules.
RULES_MOST = 50
#: An expression has at most so many bytes.
WHEN_MOST_BYTES = 1024
#: The modalities that a request may have.
MODALITIES = ("text", "image", "audio", "video")
#: Headers that rules can't read: what proves who somebody is, and what belongs to the connection.
HIDDEN_HEADERS = frozenset(
    (
        *("authorization", "proxy-authorization", "cookie", "x-api-key", "api-key", "x-goog-api-key"),
        *("host", "connection", "content-length", "transfer-encoding", "expect", "keep-alive", "proxy-connection"),
        *("te", "trailer", "upgrade", "http2-settings", "x-request-id"),
    )
)
#: What an expression may call. The rest of CEL is about times and protocol buffers, of which a request has none.
FUNCTIONS = ("contains", "double", "endsWith", "int", "matches", "size", "startsWith", "string", "uint")
#: CEL's loops over a list.
LOOPS = ("all", "exists", "exists_one", "filter", "map")


class Facts(msgspec.Struct, frozen=True, gc=False):
    """What rules may ask of a request. The docs of each stand in docs/rules.md.

    Attributes:
        path: e.g. ``/v1/chat/completions``.
        modality: what its messages hold, of ``MODALITIES``.
        tokens: estimate of the prompt: bytes of text / 4.
        messages: how many there are.
        tools: it brings tools along.
        stream: it asks for a stream.
        max_tokens: how long the answer may be; 0 where it does not say.
        user: who asks, as the body says it.
        headers: lower-case name → value; those that the rules ask for are enough.
        metadata: name → value as text.
    """

    path: str = ""
    modality: Sequence[str] = ()
    tokens: int = 0
    messages: int = 0
    tools: bool = False
    stream: bool = False
    max_tokens: int = 0
    user: str = ""
    headers: Mapping[str, str] = {}
    metadata: Mapping[str, str] = {}


_MAPS = ("headers", "metadata")
_PLAIN = tuple(name for name in Facts.__struct_fields__ if name not in _MAPS)
_TESTED = (*_MAPS, "modality")
_TEXTS = ("path", "user")
_METHODS = ("startsWith", "endsWith", "contains")
_NUMBERS = ("tokens", "messages", "max_tokens")

# What evaluating an expression may raise.
_ERRORS = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)

# So many characters of an expression stand in what is said of it.
_QUOTED_MOST = 80

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_HEADER = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,128}")
_TOKEN = re.compile(
    r"""
      (?P<space> \s+ | //[^\n]* )
    | (?P<text> [bB]?[rR](?: ""\"[\s\S]*?""\" | '''[\s\S]*?''' | "[^"\n]*" | '[^'\n]*' )
              | [bB]?(?: ""\"(?:[^\\]|\\[\s\S])*?""\" | '''(?:[^\\]|\\[\s\S])*?'''
                       | "(?:[^"\\\n]|\\.)*" | '(?:[^'\\\n]|\\.)*' ) )
    | (?P<name> [A-Za-z_][A-Za-z0-9_]* )
    | (?P<number> 0x[0-9a-fA-F]+[uU]? | (?:\d+\.\d+|\.\d+|\d+)(?:[eE][+-]?\d+)?[uU]? )
    | (?P<sign> && | \|\| | [=!<>]= | [\s\S] )
    """,
    re.VERBOSE,
)
# Between these a test like `'a' in headers` stands for itself: nothing binds more strongly on either side.
_BEFORE_TEST = frozenset(("", "(", "[", "{", "&&", "||", "?", ":", ","))
_AFTER_TEST = frozenset(("", ")", "]", "}", "&&", "||", "?", ":", ","))


class Told(msgspec.Struct, frozen=True):
    """What became of one rule for one request, for people.

    ``outcome``: ``decides``, ``passes`` (it does not apply), ``outside`` (of its percent), ``not_ready``, ``failed`` or
    ``not_asked`` (an earlier one decided). ``reason``: one sentence.
    """

    rule: str
    outcome: str
    reason: str


class Rules:
    """A model's rules, compiled.

    Attributes:
        rules: as they were set, in their order.
        headers: names of the headers that they ask for.
        metadata: names of the metadata that they ask for.
        reads_body: whether they ask for anything that stands in the body.
        restricted: whether one of them says who takes part in a switch.
        counts: (rule, outcome) → requests, of the outcomes ``decides``, ``not_ready`` and ``failed``. A rule that can't
            be evaluated for a request does not apply to it.
    """

    def __init__(self, model: str, rules: tuple[Rule, ...], seed: float = 0.0) -> None:
        """Compile. A rule that does not compile (set by a newer turnout) fails for each request instead.

        Args:
            model: whose rules these are; makes the shares of equally named rules of two models independent.
            rules: in their order.
            seed: in [0, 1), so that several gateways don't draw requests without a key in step.
        """
        self.rules = rules
        self.restricted = any(rule.candidate for rule in rules)
        self.counts: dict[tuple[str, str], int] = {}
        variables = _Variables()
        self._compiled = tuple(_Compiled(model, rule, variables, seed) for rule in rules)
        self.headers = variables.of("headers") - HIDDEN_HEADERS
        self.metadata = variables.of("metadata")
        self.reads_body = any(variable.fact not in ("path", "headers") for variable in variables.names)
        self._read = tuple(variables.readers())
        self._last: dict[str, Any] = {name: read(_EMPTY) for name, read in self._read}
        self._context: cel.Context = _cel().Context(self._last)
        self._first = _first(self._compiled)

    def choose(self, facts: Facts, key: bytes = b"", usable: Callable[[Rule], bool] | None = None) -> Rule | None:
        """The first rule that applies; None: the split decides.

        Args:
            facts: of the request.
            key: its sticky key, for a rule's percent; empty: by turns.
            usable: whether a rule's target can take a request now; without it each can. Asked last.
        """
        context, start = self._told(facts), 0
        if self._first is not None:
            try:
                start = self._first.execute(context)
            except _ERRORS:
                start = 0
            if start < 0:
                return None
        for compiled in self._compiled[start:]:
            try:
                applies = compiled.program.execute(context)
            except _ERRORS:
                applies = None
            if applies is True:
                share = compiled.share
                if share is not None:
                    bucket = share.bucket(key) if key else compiled.spread.bucket()
                    if share.version_at(bucket) != _IN:
                        continue
                if usable is None or usable(compiled.rule):
                    self._count(compiled.rule, "decides")
                    return compiled.rule
                self._count(compiled.rule, "not_ready")
            elif applies is not False:
                self._count(compiled.rule, "failed")
        return None

    def _count(self, rule: Rule, outcome: str) -> None:
        counted = (rule.name, outcome)
        self.counts[counted] = self.counts.get(counted, 0) + 1

    def explain(self, facts: Facts, key: bytes = b"", usable: Callable[[Rule], bool] | None = None) -> tuple[Told, ...]:
        """What ``choose`` would do with each rule, and why. A request without a key is taken to be within a percent."""
        context, told, decided = self._told(facts), list[Told](), ""
        for compiled in self._compiled:
            rule = compiled.rule
            if decided:
                told.append(Told(rule.name, "not_asked", f"{decided!r} has decided"))
                continue
            outcome, reason = self._outcome(compiled, context, facts, key)
            if outcome == "decides" and usable is not None and not usable(rule):
                outcome, reason = "not_ready", f"{reason}, but {target(rule)} has no ready instance"
            if outcome == "decides":
                decided = rule.name
            told.append(Told(rule.name, outcome, reason))
        return tuple(told)

    def _outcome(self, compiled: _Compiled, context: cel.Context, facts: Facts, key: bytes) -> tuple[str, str]:
        rule = compiled.rule
        given = compiled.given(facts)
        try:
            applies = compiled.program.execute(context)
        except _ERRORS as e:
            return "failed", f"{rule.when} can't be evaluated{given}: {_said(e)}"
        if not isinstance(applies, bool):
            return "failed", f"{rule.when} is neither true nor false{given}"
        if not applies:
            return "passes", f"{rule.when} is false{given}"
        true = f"{rule.when} is true{given}"
        if compiled.share is None:
            return "decides", true
        if not key:
            return "decides", f"{true}; without a sticky key {rule.percent:g} % of such requests are drawn"
        bucket = compiled.share.bucket(key)
        inside = compiled.share.version_at(bucket) == _IN
        where = f"the request's key is at {bucket / 100:g} %, {'inside' if inside else 'outside'} of {rule.percent:g} %"
        return "decides" if inside else "outside", f"{true}; {where}"

    def _told(self, facts: Facts) -> cel.Context:
        """The context with these facts. Only what differs from the last request is set: that is what costs."""
        last, changed = self._last, dict[str, Any]()
        for name, read in self._read:
            value = read(facts)
            if last[name] != value:
                last[name] = changed[name] = value
        if changed:
            self._context.update(changed)
        return self._context


def _first(compiled: Sequence[_Compiled]) -> cel.Program | None:
    """One program for all rules: the place of the first that applies, -1 for none; it fails where one of them does.

    Most requests meet no rule, and then one call is a third of the price of a call for each. None where a rule does not
    compile, or where all together are nested more deeply than CEL takes.
    """
    source = "-1"
    for place, one in reversed(tuple(enumerate(compiled))):
        if not one.source:
            return None
        source = f"({one.source}) ? {place} : {source}"
    try:
        program: cel.Program = _cel().compile(source)
    except _ERRORS:
        return None
    return program


def target(rule: Rule) -> str:
    """Where a rule sends what it applies to, in words."""
    return f"version {rule.version}" if rule.version else f"model {rule.model}" if rule.model else "the switch's split"


def problems(rules: Sequence[Rule]) -> tuple[str, ...]:
    """What can't be meant in a model's rules, one sentence each, naming rule and field."""
    found: list[str] = []
    if len(rules) > RULES_MOST:
        found.append(f"there are {len(rules)} rules: at most {RULES_MOST} are allowed")
    names: set[str] = set()
    for number, rule in enumerate(rules[:RULES_MOST]):
        if _NAME.fullmatch(rule.name):
            who = f"rule {rule.name!r}"
        else:
            who = f"rules[{number}]"
            found.append(f"{who}.name is {rule.name!r}: use up to 64 letters, digits and . _ + -")
        if rule.name in names:
            found.append(f"{who}: name: there are two rules of this name")
        names.add(rule.name)
        targets = [
            field for field, said in (("version", rule.version), ("model", rule.model), ("candidate", rule.candidate))
            if said
        ]  # fmt: skip
        if len(targets) != 1:
            said = f"has {' and '.join(targets)}" if targets else "has no target"
            found.append(f"{who}: {said}: give exactly one of version, model and candidate = true")
        if not (math.isfinite(rule.percent) and 0 < rule.percent <= 100):
            found.append(f"{who}: percent is {rule.percent:g}: it must be more than 0 and at most 100")
        found += (f"{who}: when: {problem}" for problem in _when_problems(rule.when))
    return tuple(found)


def _when_problems(when: str) -> Iterator[str]:
    size = len(when.encode("utf-8", "surrogatepass"))
    if size > WHEN_MOST_BYTES:
        yield f"the expression has {size} bytes: at most {WHEN_MOST_BYTES} are allowed"
        return
    if not when.strip():
        yield "it is empty: write an expression, or true for all requests"
        return
    try:
        _cel().compile(when)
    except _ERRORS as e:
        yield f"{_short(when)} is no CEL expression: {_said(e)}"
        return
    variables = _Variables()
    expression = _Expression(when, variables)
    wrong = (*expression.problems, *_unknown(expression, variables))
    yield from wrong
    if not wrong:
        yield from _tried(expression, variables)


def _unknown(expression: _Expression, variables: _Variables) -> Iterator[str]:
    """Names that nothing stands behind, loops in loops, patterns that are none."""
    program = expression.compile()
    known = {*_PLAIN, *variables.names.values(), *expression.bound, *FUNCTIONS}
    for name in program.variables():
        if name not in known or (name.startswith("_") and name in expression.words):
            yield f"there is no {name!r}: a rule may ask for {', '.join((*_PLAIN, *_MAPS))}"
    for name in program.functions():
        if name[:1].isalpha() and name not in FUNCTIONS:
            yield f"there is no function {name!r}: a rule may call {', '.join(FUNCTIONS)}, and {', '.join(LOOPS)}"
    for name in sorted(expression.bound.intersection((*_PLAIN, *_MAPS))):
        yield f"a loop calls its element {name!r}, which is the name of a fact: take another"
    if expression.depth > 1:
        yield "a loop stands inside a loop: that can take long for each request"
    for pattern in expression.patterns:
        try:
            _cel().compile(f"''.matches({pattern})").execute()
        except _ERRORS as e:
            reason = re.search(r"^error: (.*)", str(e), re.MULTILINE)
            yield f"{pattern} is no regular expression" + (f": {reason[1]}" if reason else "")


def _tried(expression: _Expression, variables: _Variables) -> Iterator[str]:
    """Evaluate it for requests of all kinds: it must be true or false, and may not fail for all of them."""
    program, readers = expression.compile(), tuple(variables.readers())
    why: list[str] = []
    count = 0
    for facts in _samples(expression, variables):
        count += 1
        try:
            value = program.execute({name: read(facts) for name, read in readers})
        except TypeError as e:  # types never differ between requests
            yield f"{_short(expression.when)} can't be evaluated: {_said(e)}"
            return
        except _ERRORS as e:
            why.append(_said(e))
            continue
        if not isinstance(value, bool):
            yield f"{_short(expression.when)} is {value!r} for a request where it should be true or false"
            return
    if len(why) == count:
        yield f"{_short(expression.when)} fails for every request: {why[-1]}"


def _samples(expression: _Expression, variables: _Variables) -> Iterator[Facts]:
    """Requests without and with everything, and such as have what the expression names."""
    texts = ["", "1", *expression.texts]
    numbers = {0, 1, *(n + d for n in expression.numbers for d in (-1, 0, 1) if 0 <= n + d < 2**53)}
    headers, fields = variables.of("headers"), variables.of("metadata")
    full = Facts("/v1/chat/completions", MODALITIES, 5000, 20, True, True, 1000, "alice")
    for base in (Facts(), full):
        yield base
        for text in texts:
            of = dict.fromkeys
            yield msgspec.structs.replace(base, headers=of(headers, text), metadata=of(fields, text))
            yield msgspec.structs.replace(
                base, path=text, user=text, headers=of(headers, text), metadata=of(fields, text)
            )
        for number in sorted(numbers):
            yield msgspec.structs.replace(base, **dict.fromkeys(_NUMBERS, number))


class _Variable(NamedTuple):
    """Something that expressions ask of the facts.

    Attributes:
        fact: name of the fact.
        key: the entry, where the fact is a map.
        test: what is asked of it: "" for the value itself, ``in`` whether the entry is there, or how the value compares
            with ``text``. A test is made here, because handing a text to CEL costs more than the test.
    """

    fact: str
    key: str = ""
    test: str = ""
    text: str = ""

    @property
    def said(self) -> str:
        """As a person would call it."""
        if self.test == "in":
            return f"{self.key!r} in {self.fact}"
        return f"{self.fact}[{self.key!r}]" if self.fact in _MAPS else self.fact

    def reader(self) -> Callable[[Facts], Any]:
        """How it is read."""
        fact, key, test, text = self
        of: Callable[[Facts], Any] = attrgetter(fact)
        if test == "in":
            return lambda facts: key in of(facts)
        if fact == "modality":
            return lambda facts: list(facts.modality)
        read: Callable[[Facts], Any] = (lambda facts: of(facts).get(key, "")) if fact in _MAPS else of
        match test:
            case "==":
                return lambda facts: read(facts) == text
            case "startsWith":
                return lambda facts: read(facts).startswith(text)
            case "endsWith":
                return lambda facts: read(facts).endswith(text)
            case "contains":
                return lambda facts: text in read(facts)
            case _:
                return read


class _Variables:
    """The variables of one set of rules. ``names``: of each in the compiled expressions."""

    def __init__(self) -> None:
        self.names: dict[_Variable, str] = {}

    def name(self, variable: _Variable) -> str:
        """The name; made where there is none."""
        plain = not variable.key and not variable.test
        return self.names.setdefault(variable, variable.fact if plain else f"_{len(self.names)}")

    def of(self, fact: str) -> frozenset[str]:
        """The entries of one map that are asked for."""
        return frozenset(variable.key for variable in self.names if variable.fact == fact)

    def readers(self) -> Iterator[tuple[str, Callable[[Facts], Any]]]:
        """Name → how it is read."""
        for variable, name in self.names.items():
            yield name, variable.reader()


class _Expression:
    """One expression over variables: every entry of a map, and every simple test of a text, is one of its own.

    Attributes:
        when: as it was written; ``source``: as it is compiled.
        problems: what can't be meant in how it uses the maps.
        bound: names that its loops bind; ``depth``: how deep they stand in each other.
        words: names that it holds.
        texts, numbers: what stands in it literally; ``patterns``: the source of those that ``matches`` gets.
        uses: (what a person would call it, how it is read) of every fact that it asks for.
    """

    def __init__(self, when: str, variables: _Variables) -> None:
        self.when = when
        self.problems: list[str] = []
        self.bound: set[str] = set()
        self.depth = 0
        self.texts: list[str] = []
        self.numbers: list[int] = []
        self.patterns: list[str] = []
        self.uses: dict[str, Callable[[Facts], Any]] = {}
        self._variables = variables
        found = [m for m in _TOKEN.finditer(when) if m.lastgroup != "space"]
        self._tokens = tuple(m[0] for m in found)
        self._kinds = tuple("bytes" if m["text"] and m[0][0] in "bB" else m.lastgroup or "" for m in found)
        self.words = {token for token, kind in zip(self._tokens, self._kinds, strict=True) if kind == "name"}
        self._note_literals()
        self._note_loops()
        self.source = " ".join(self._translated())

    def compile(self) -> cel.Program:
        """As a program over the variables."""
        program: cel.Program = _cel().compile(self.source)
        return program

    def _at(self, place: int) -> str:
        return self._tokens[place] if 0 <= place < len(self._tokens) else ""

    def _kind(self, place: int) -> str:
        return self._kinds[place] if 0 <= place < len(self._kinds) else ""

    def _note_literals(self) -> None:
        for place, (token, kind) in enumerate(zip(self._tokens, self._kinds, strict=True)):
            if kind == "text":
                self.texts.append(_literal(token))
                if self._at(place - 1) == "(" and self._at(place - 2) == "matches":
                    self.patterns.append(token)
            elif kind == "number" and token.isdigit():
                self.numbers.append(int(token))

    def _note_loops(self) -> None:
        open_loops: list[bool] = []
        for place, sign in enumerate(self._tokens):
            if sign in ("(", "[", "{"):
                loop = sign == "(" and self._at(place - 1) in LOOPS and self._at(place - 2) == "."
                open_loops.append(loop)
                if loop:
                    self.depth = max(self.depth, sum(open_loops))
                    self.bound.add(self._at(place + 1))
            elif sign in (")", "]", "}") and open_loops:
                open_loops.pop()

    def _translated(self) -> Iterator[str]:
        place = 0
        while place < len(self._tokens):
            made, taken = self._translate(place)
            yield made
            place += taken

    def _translate(self, place: int) -> tuple[str, int]:
        """The source for what stands here, and how many tokens that is."""
        word, kind, at = self._tokens[place], self._kinds[place], self._at
        if kind == "text" and at(place + 1) == "in" and at(place + 2) in _TESTED and self._alone(place, 3):
            return self._asked(_Variable(at(place + 2), _literal(word), "in")), 3
        if kind != "name" or at(place - 1) == ".":
            return word, 1
        if word == "has" and at(place + 2) in _MAPS and at(place + 3) == "." and at(place + 5) == ")":
            return self._asked(_Variable(at(place + 2), at(place + 4), "in")), 6
        if word in _TEXTS:
            return self._tested(_Variable(word), place, 1)
        if word in _MAPS:
            if at(place + 1) == "[" and self._kind(place + 2) == "text" and at(place + 3) == "]":
                return self._tested(_Variable(word, _literal(at(place + 2))), place, 4)
            if at(place + 1) == "." and self._kind(place + 2) == "name" and at(place + 3) != "(":
                return self._tested(_Variable(word, at(place + 2)), place, 3)
            self.problems.append(
                f"{word} can only be asked for one entry: {word}['name'], ('name' in {word}) or has({word}.name)"
            )
            return "''", 1
        return (self._asked(_Variable(word)) if word in _PLAIN else word), 1

    def _alone(self, place: int, length: int) -> bool:
        """Whether nothing beside so many tokens binds more strongly than what joins them."""
        return self._at(place - 1) in _BEFORE_TEST and self._at(place + length) in _AFTER_TEST

    def _tested(self, variable: _Variable, place: int, length: int) -> tuple[str, int]:
        """The source for a text, or for how it compares with the literal that follows it."""
        end, at = place + length, self._at
        how = at(end)
        if how in ("==", "!=") and self._kind(end + 1) == "text" and self._alone(place, length + 2):
            made = self._asked(variable._replace(test="==", text=_literal(at(end + 1))))
            return made if how == "==" else f"! {made}", length + 2
        method = at(end + 1)
        if how == "." and method in _METHODS and self._kind(end + 3) == "text" and at(end + 4) == ")":
            return self._asked(variable._replace(test=method, text=_literal(at(end + 3)))), length + 5
        return self._asked(variable), length

    def _asked(self, variable: _Variable) -> str:
        """The name of a variable."""
        fact, key = variable.fact, variable.key
        if fact == "headers":
            if not _HEADER.fullmatch(key):
                self.problems.append(f"{key!r} is no header's name: write it in lower case")
            elif key in HIDDEN_HEADERS or key.startswith("x-turnout-"):
                self.problems.append(f"rules can't read the header {key!r}")
        if fact == "modality" and key and key not in MODALITIES:
            self.problems.append(f"there is no modality {key!r}: there are {', '.join(MODALITIES)}")
        value = variable if variable.test == "in" else variable._replace(test="", text="")
        self.uses[value.said] = value.reader()
        return self._variables.name(variable)


class _Never:
    """Stands in for an expression that does not compile."""

    def __init__(self, why: str) -> None:
        self._why = why

    def execute(self, context: object) -> object:
        """Fail."""
        raise ValueError(self._why)


_IN, _OUT = "in", "out"


class _Compiled:
    """One rule, ready to be asked.

    ``source``: what was compiled, empty where nothing could be. ``share``: who is within its percent; None where
    everybody is.
    """

    __slots__ = ("program", "rule", "share", "source", "spread", "uses")

    def __init__(self, model: str, rule: Rule, variables: _Variables, seed: float) -> None:
        self.rule = rule
        self.uses: dict[str, Callable[[Facts], Any]] = {}
        self.program: cel.Program | _Never
        try:
            expression = _Expression(rule.when, variables)
            self.program, self.uses, self.source = expression.compile(), expression.uses, expression.source
        except _ERRORS as e:
            self.program, self.source = _Never(_said(e)), ""
        self.spread = Spread(seed)
        self.share: SplitTable | None = None
        if rule.percent < 100:
            halves = Split(_IN, rule.percent, ()), Split(_OUT, 100 - rule.percent, ())
            self.share = SplitTable(halves, f"rule:{model}:{rule.name}")

    def given(self, facts: Facts) -> str:
        """The facts that it asks for, in words."""
        said = [f"{name} is {_shown(read(facts))}" for name, read in self.uses.items()]
        return f" ({', '.join(said)})" if said else ""


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"[{', '.join(cast('Sequence[str]', value))}]" if isinstance(value, list | tuple) else repr(value)


def _short(when: str) -> str:
    return repr(when if len(when) <= _QUOTED_MOST else f"{when[:_QUOTED_MOST]} …")


def _literal(token: str) -> str:
    """The text that a literal means."""
    value: str = _cel().compile(token).execute()
    return value


def _said(e: Exception) -> str:
    """The first line of what CEL says, without what it has quoted before."""
    text = str(e.args[0] if e.args else e).split("\n", 1)[0]
    text = re.sub(r"^Failed to (?:parse|compile) expression .*?: ERROR: <input>:\d+:(\d+): ", r"at column \1: ", text)
    return text.split(" expecting ", 1)[0].split(". ", 1)[0].rstrip(".")


@cache
def _cel() -> Any:
    """The compiled module of ``common-expression-language``, without the command line that its package imports.

    ``import cel`` takes 0.3 s for typer and prompt_toolkit; this takes a few ms, and only where there are rules. The
    module can be initialised once in a process, so it is left where the package would look for it.
    """
    name = "cel.cel"
    if name not in sys.modules:
        package = find_spec("cel")
        spec = PathFinder.find_spec(name, package.submodule_search_locations if package else None)
        if spec is None or spec.loader is None:
            raise ModuleNotFoundError("common-expression-language is not installed: install turnout again", name="cel")
        sys.modules[name] = module = module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


_EMPTY = Facts()
