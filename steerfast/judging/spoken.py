"""Reduce an answer to the words that it says in its own voice: no thought, no markup, no quotation."""

from __future__ import annotations

import re
import unicodedata

# Signs that read alike: apostrophes, quotation marks of all languages, and letters that case or spelling varies. Left
# out: joiners, the dot of a small İ, the stretch and the vowel signs of Arabic.
_ALIKE = {"'": "‘’‚‛ʼ´′＇‹›", '"': "“”„‟«»「」『』＂", "ا": "أإآٱ", "ي": "ى", "ं": "ँ", "i": "ı"}
_SIGNS: dict[int, str | None] = {ord(sign): one for one, signs in _ALIKE.items() for sign in signs}
_SIGNS |= dict.fromkeys(map(ord, "\u00ad\u200b\u2060\ufeff\u0307\u0640")) | dict.fromkeys(range(0x064B, 0x0660))


def fold_signs(text: str) -> str:
    """Return a text with one form of each sign, case kept: apostrophes, quotation marks, Arabic and Turkish letters."""
    return re.sub(r"(?<=\w)`(?=\w)", "'", unicodedata.normalize("NFC", text).translate(_SIGNS))


def fold(text: str) -> str:
    """Return `fold_signs` of a text in lower case."""
    return fold_signs(text.lower())


def compiled(pattern: str, flags: int = 0) -> re.Pattern[str]:
    """Return a pattern for folded texts."""
    return re.compile(fold_signs(pattern), flags)


_THOUGHT = "think|thinking|thought|reasoning"
_CLOSED = re.compile(
    rf".*(?:</(?:{_THOUGHT})>|\[/THINK\]|<\|channel\|>final<\|message\|>)|"
    # A thought without an end was cut: there is no answer.
    rf"\s*(?:<(?:{_THOUGHT})>|\[THINK\]|<\|channel\|>analysis<\|message\|>).*",
    re.DOTALL | re.IGNORECASE,
)
# Emphasis, headings and quoted blocks: "**Step 1**" reads as "step 1"; a single "*" before a space is a bullet.
_MARKS = re.compile(r"\*\*|__|</?(?:b|i|em|strong|p)>|(?<!\w)[*_](?=\w)|(?<=[\w.!?])[*_](?!\w)|^\s*#+ *|^\s*> *", re.M)
_LABEL = compiled(
    r"\W*(?:(?:final|my|the|ai|model)\s+)?(?:answer|response|reply|assistant|ai|bot|chatbot|model|output|refusal|"
    r"antwort|assistent|réponse|respuesta|asistente|risposta|assistente|resposta|ответ|ассистент|помощник|cevap|yanit|"
    r"asistan|回答|答案|回复|答|助手|アシスタント|답변|답|어시스턴트|الاجابة|الجواب|المساعد|उत्तर|जवाब|सहायक|উত্তর|সহায়ক)\s*[:：]\s*"
)
_SINGLE = r"(?<!\w)'(?=\S)(?:[^'\n]|(?<=\w)'(?=\w)){1,300}'(?!\w)"
_QUOTED = re.compile(r"\"[^\"\n]*(?:\"|$)|" + _SINGLE, re.M)
_WHOLE = re.compile(r"\"([^\"]+)\"?|'((?:[^'\n]|(?<=\w)'(?=\w))+)'")


def without_thought(text: str) -> str:
    """Return the answer after the thought of a reasoning model; "" where the thought was cut before its end."""
    return _CLOSED.sub("", text, count=1) if _CLOSED.match(text) else text


def plain(text: str) -> str:
    """Return the folded answer without thought, markup, a label such as "Answer:" and quotation marks around all."""
    text = _MARKS.sub("", re.sub(r"\n\s*\n", "\n\n", fold(without_thought(text)))).strip()
    text = text[found.end() :] if (found := _LABEL.match(text)) else text
    whole = _WHOLE.fullmatch(text)
    return whole[1] or whole[2] if whole else text


def unquoted(text: str) -> str:
    """Return a folded text with every quotation emptied."""
    return _QUOTED.sub('""', text)
