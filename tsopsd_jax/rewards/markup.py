r"""One spelling for what LaTeX, Unicode and people's typing spell in many ways: `clean`.

Every pattern sees a short text (answers.LONGEST_ANSWER_CHARACTERS), and each loop takes something away.
"""

import re
import unicodedata
from functools import lru_cache

_GREEK = "αβγδεζηθικλμνξρσςτυφϕχψωΓΔΘΛΞΣΦΨΩΩ"
_GREEK_NAMES = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma sigma "
    "tau upsilon phi phi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega Omega"
)
_UNICODE = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "π": "\\pi ", "∞": "\\infty ", "×": "\\times ",
        "·": "\\cdot ", "⋅": "\\cdot ", "∙": "\\cdot ", "∗": "*",
        "÷": "\\div ", "∕": "/", "⁄": "/", "≤": "\\le ", "≥": "\\ge ", "⩽": "\\le ", "⩾": "\\ge ",
        "≠": "\\ne ", "≈": "\\approx ", "≡": "\\equiv ", "±": "\\pm ", "∓": "\\mp ", "∪": "\\cup ", "∩": "\\cap ",
        "∈": "\\in ", "∖": "\\setminus ", "√": "\\sqrt ", "∛": "\\sqrt[3]", "º": "°", "∅": "\\emptyset ",
        "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}", "ℚ": "\\mathbb{Q}", "ℂ": "\\mathbb{C}", "′": "'",
        "’": "'", "″": "''", "。": ".", "、": ",", "〈": "\\langle ", "〉": "\\rangle ", "⟨": "\\langle ",
        "⟩": "\\rangle ", "∶": ":", "︰": ":", "【": "[", "】": "]",
        "\u00ad": None, "\u200b": None, "\u200c": None, "\u200d": None, "\u200e": None, "\u200f": None,
        "\u2060": None, "\ufeff": None,
        "\n": " ", "\t": " ", "\r": " ",
        **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full width
        **dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹", (f"^{digit}" for digit in range(10)), strict=True)),
        **dict(zip("₀₁₂₃₄₅₆₇₈₉", (f"_{digit}" for digit in range(10)), strict=True)),
        **{letter: f"\\{name} " for letter, name in zip(_GREEK, _GREEK_NAMES.split(), strict=True)},
        "€": "\\text{euro}", "£": "\\text{pound}", "¥": "\\text{yen}", "₹": "\\text{rupee}", "₩": "\\text{won}",
        "Ø": "\\emptyset ", "¢": "\\text{cent}",
    }
)  # fmt: skip
_INVISIBLE = re.compile(r"[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
_FULL_WIDTH_OPEN = {"｛": "\\{", "｝": "\\}", "＄": "\\$"}

# Commands of size, font and place.
_DECLARATIONS = (
    "left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle textstyle "
    "scriptstyle limits nolimits large Large LARGE huge Huge small tiny normalsize footnotesize bf rm it sf tt "
    "bfseries boldmath notag nonumber quad qquad hfill blacksquare square qed therefore normalfont em "
    "centering strut null"
)
# Commands that mean another command, or nothing.
_SAME = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), "\\frac"), **dict.fromkeys(("dbinom", "tbinom"), "\\binom"),
    **dict.fromkeys(("leq", "leqslant"), "\\le"), **dict.fromkeys(("geq", "geqslant"), "\\ge"),
    "neq": "\\ne", "lt": "<", "gt": ">", "colon": ":", "lbrace": "\\{", "rbrace": "\\}", "lbrack": "[", "rbrack": "]",
    "varnothing": "\\emptyset", "backslash": "\\setminus", "smallsetminus": "\\setminus", "ast": "*",
    "cdotp": "\\cdot", "land": "\\and", "lor": "\\or",
    "wedge": "\\and", "vee": "\\or", "iff": "\\and", "langle": "(", "rangle": ")", "degree": "°", "prime": "'",
    "infin": "\\infty", "simeq": "\\approx",
    "R": "\\mathbb{R}", "reals": "\\mathbb{R}", "Z": "\\mathbb{Z}", "N": "\\mathbb{N}",
    "tg": "\\tan", "ctg": "\\cot", "arctg": "\\arctan",
    "pounds": "\\text{pound}", "euro": "\\text{euro}", "yen": "\\text{yen}", "exponentialE": "e", "imaginaryI": "i",
    **dict.fromkeys(("lvert", "rvert", "vert", "mid"), "|"),
    **dict.fromkeys(_DECLARATIONS.split(), " "),
}  # fmt: skip
_DROPPED_WITH_ARGUMENT = (
    "tag",
    "label",
    "phantom",
    "hphantom",
    "vphantom",
    "hspace",
    "vspace",
    "color",
    "textcolor",
    "colorbox",
    "mspace",
)
_WRAPPERS = (
    "mathbf boldsymbol bm mathsf mathit mathtt mathcal mathnormal underline uline boxed fbox "
    "framebox ensuremath mathord mathop smash pmb bold cancel underbrace overbrace"
)
_TEXTS = "text textbf textit textrm texttt textsf textnormal textup mbox hbox mathrm operatorname emph textsl"
_FUNCTION_NAMES = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|lg|log|exp|sqrt|gcd|lcm|max|min"

_COMMAND = re.compile(r"\\([A-Za-z]+)\*?")
_SPACING = re.compile(r"\\[,;:! ]|~")
_THIN_THOUSANDS = re.compile(
    r"(?<=[0-9]),\\! ?(?=[0-9]{3})|(?<=[0-9])\{,\}(?=[0-9]{3})|(?<=[0-9])\\[,;: ](?=[0-9]{3}(?![0-9]))"
)
_DEGREES = re.compile(r" ?\^ ?(?:\{ ?(?:\\circ|°) ?\}|\\circ(?![A-Za-z])|°)")
_ORDINAL = re.compile(
    r"(?<=[0-9]) ?\^ ?\\text ?\{ ?(?:st|nd|rd|th) ?\}|"
    r"(?<=[0-9]) ?\^ ?\{ ?(?:\\text ?\{ ?(?:st|nd|rd|th) ?\}|st|nd|rd|th) ?\}|(?<=[0-9])(?:st|nd|rd|th)\b(?![A-Za-z])"
)
_SUPERSCRIPTS = re.compile(r"\^([0-9])((?:\^[0-9])+)")
_RECURRING = re.compile(
    r"([0-9]*)\.([0-9]*)(?:\\(?:overline|bar|dot)(?: ?\{ ?([0-9]+) ?\}| ([0-9])|([0-9]))|\(([0-9]+)\))(?!\.?[0-9])"
)
_DOTTED = re.compile(
    r"([0-9]*\.[0-9]*)\\dot(?: ?\{ ?([0-9]) ?\}| ?([0-9]))([0-9]*)\\dot(?: ?\{ ?([0-9]) ?\}| ?([0-9]))"
)
_TYPED = [
    (re.compile(r"(?<![A-Za-z\\])(?:\\?infinity|oo|inf)(?![A-Za-z])"), r"\\infty "),
    (re.compile(rf"(?<![A-Za-z\\])({_FUNCTION_NAMES})(?=[ ({{0-9^_\\]|pi\b)"), r"\\\1 "),
    (re.compile(r"(?<![A-Za-z\\])(pi|theta|alpha|beta|gamma|lambda|omega|phi)(?![A-Za-z])"), r"\\\1 "),
    (re.compile(r" ?(?:\\text ?\{ ?per ?cent ?\}|(?<=[0-9]) ?per ?cent)\Z"), "%"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"(?<=[0-9A-Za-z)}\]]) (and|or) (?=[-+0-9A-Za-z(\[\\{])"), r" \\\1 "),
    (re.compile(r"\(mod ([0-9A-Za-z]+)\)"), r" \\text{mod} \1"),
    (re.compile(r"\A([0-9.]+) (?:to|\\text\{ ?to ?\}) ?([0-9.]+)\Z"), r"\1:\2"),
    (re.compile(r"\A\]([^\[\]()]*)\[\Z"), r"(\1)"),
    (re.compile(r"\A\]([^\[\]()]*)\]\Z"), r"(\1]"),
    (re.compile(r"\A\[([^\[\]()]*)\[\Z"), r"[\1)"),
    (re.compile(r"\A\\\{ ?([a-z]) ?(?:\\in ?\\mathbb\{R\} ?)?[|:](?!.*[|:])(.*)\\\}\Z"), r"\2"),
    (re.compile(r"<="), r"\\le "), (re.compile(r">="), r"\\ge "), (re.compile(r"!="), r"\\ne "),
    (re.compile(r"(?<=[0-9]) ?[xX] ?(?=10 ?\^)"), r"\\times "),
    (re.compile(r"\\overline ?\{ ?([A-Za-z]{2,}) ?\}"), r"\1"),
    (re.compile(r"\\pmod ?\{([^{}]*)\}|\(? ?\\(?:bmod|mod|pmod) ?([0-9A-Za-z]+) ?\)?"), r" \\text{mod} \1\2"),
    (re.compile(r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}"), r"\\frac{\1}{\2}"),
    (re.compile(r"\A([^{}]*)\\over(?![A-Za-z])([^{}]*)\Z"), r"\\frac{\1}{\2}"),
    (re.compile(r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}"), r"\\binom{\1}{\2}"),
    (re.compile(r"\\sqrt ?\{?\}?\[([0-9]+)\]"), r"\\sqrt[\1]"),
]  # fmt: skip


@lru_cache(4096)
def clean(answer: str) -> str:
    """Strip markup and markers of money and put one spelling for each symbol; no change of meaning."""
    text = "".join(_FULL_WIDTH_OPEN.get(character, character) for character in _INVISIBLE.sub("", answer))
    text = re.sub(r"\\text ?\{ ?([€£¥₹¢]|\\\$) ?\}", r" \1", text)
    text = re.sub(r"\b(?:US|CA|AU|NZ|HK) ?(?=\\\$)", "", text)
    text = _fractions(text).translate(_UNICODE)
    text = _without_space_characters(text)
    text = _SUPERSCRIPTS.sub(lambda match: f"^{{{match[1]}{match[2].replace('^', '')}}}", text)
    text = text.replace("\\$", "\\text{dollar}").replace("$", " ")
    text = re.sub(r"(?<!\\)\\[()\[\]]", " ", text).replace("\\%", "%").replace("\\&", "&").replace("\\#", "#")
    text = _THIN_THOUSANDS.sub("", text)
    text = _unwrapped(text)
    text = _SPACING.sub(" ", text.replace("\\\\", "\0")).replace("\0", "\\\\").replace("{,}", ",").replace("{}", "")
    text = _ORDINAL.sub("", _DEGREES.sub("°", text))
    text = _RECURRING.sub(_recurring, _DOTTED.sub(r"\1\\overline{\2\3\4\5\6}", text))
    for pattern, latex in _TYPED:
        text = pattern.sub(latex, text)
    return " ".join(text.split())


def braced(text: str) -> str | None:
    r"""The part of `text` before the brace that closes an open one; `\{` and `\}` are plain characters."""
    depth, escaped = 1, False
    for at, character in enumerate(text):
        if not escaped and character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return text[:at]
        escaped = character == "\\" and not escaped
    return None


def unwrap_text(text: str) -> str:
    r"""`\text{cm}` -> `cm`. At most as many rounds as the (short) text has characters."""
    while (at := text.find("\\text{")) >= 0:
        content = braced(text[at + 6 :])
        if content is None:
            return text
        text = text[:at] + content + text[at + 7 + len(content) :]
    return text


def remove_spaces(text: str) -> str:
    """Drop white space, except between two digits: `3 4` is not 34, and `1 1/2` is not 11/2."""
    words = text.split()
    joined = words[0] if words else ""
    for word in words[1:]:
        between_digits = joined[-1].isdigit() and word[0].isdigit()
        joined += (" " if between_digits else "") + word
    return joined


def _fractions(text: str) -> str:
    """`½` -> a fraction in LaTeX, and other Unicode variants of letters and digits by compatibility."""
    out = []
    for character in text:
        if unicodedata.decomposition(character).startswith("<fraction>"):
            above, _, below = unicodedata.normalize("NFKC", character).partition("\u2044")
            out.append(f"\\frac{{{above}}}{{{below}}}")
        elif unicodedata.decomposition(character).startswith("<font>"):
            out.append(unicodedata.normalize("NFKC", character))
        else:
            out.append(character)
    return "".join(out)


def _without_space_characters(text: str) -> str:
    return "".join(" " if character.isspace() else character for character in text)


def _unwrapped(text: str) -> str:
    """Commands renamed or dropped, from left to right; an argument that is only dressed up is kept bare."""
    out, at = [], 0
    while (match := _COMMAND.search(text, at)) is not None:
        if match.start() and _backslashes_before(text, match.start()) % 2:
            out.append(text[at : match.start() + 1])
            at = match.start() + 1
            continue
        out.append(text[at : match.start()])
        name, after = match[1], text[match.end() :]
        at = match.end()
        if name in _DROPPED_WITH_ARGUMENT and (option := re.match(r" ?\[[^\[\]]*\]", after)):
            at, after = at + option.end(), after[option.end() :]
        blanks = len(after) - len(after.lstrip())
        content = braced(after[blanks + 1 :]) if after[blanks : blanks + 1] == "{" else None
        if name in _DROPPED_WITH_ARGUMENT and content is not None:
            at += blanks + len(content) + 2
        elif name in _WRAPPERS.split():
            if content is not None:
                # Spliced in place, so that what it contains is looked at as well.
                text = text[:at] + f" {content} " + after[blanks + len(content) + 2 :]
        elif name in _TEXTS.split():
            if content is None:
                out.append(" ")
                continue
            text, at = text[:at] + _text(content, name) + after[blanks + len(content) + 2 :], at
            if text[at : at + 6] == "\\text{":
                out.append("\\text{")
                at += 6
        else:
            out.append(_SAME.get(name, match[0]) + (" " if name in _SAME else ""))
    return "".join(out) + text[at:]


def _text(content: str, command: str) -> str:
    r"""Words stay `\text{...}`; what is no word (`5`, `(B)`, `i`) comes out of it; a function's name is its command."""
    bare = content.strip()
    if re.fullmatch(_FUNCTION_NAMES, bare) and (command == "operatorname" or bare not in ("min", "sec")):
        return f"\\{bare} "
    if bare in ("and", "or", "And", "Or", "AND", "OR"):
        return f"\\{bare.lower()} "
    if (
        bare in ("i", "e")
        or not re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", bare))
        or re.fullmatch(r"\([A-Z]\)", bare)
    ):
        return f" {content} "
    if match := re.fullmatch(r"( *[+-]?[0-9][0-9.,/]*)([^0-9]*)", content):  # \text{5 cm}
        return f"{match[1]}\\text{{{match[2]}}}"
    return f"\\text{{{content}}}"


def _backslashes_before(text: str, at: int) -> int:
    count = 0
    while at - count > 0 and text[at - count - 1] == "\\":
        count += 1
    return count


def _recurring(match: re.Match) -> str:
    r"""`0.1\overline{6}` -> the fraction (16 - 1) / 90."""
    whole, fixed = match[1] or "0", match[2]
    period = next(group for group in match.groups()[2:] if group)
    above = int(whole + fixed + period) - int(whole + fixed)
    below = int("9" * len(period) + "0" * len(fixed))
    return f"({above}/{below})"
