"""A guess of the language of a short text: by script, and within a script by stop words and letters.

Made for one question: does a list of refusals speak the language of this answer? Texts without a stop word ("positive")
have no known language. Codes are those of ISO 639-1.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache

_STOP_WORDS = {
    "en": "the a of and to in is that it for you this with on are be can i not have your or an if will from how "
    "what as by but at there they would do about was their we when which i'm can't here sure use first then "
    "my",
    "de": "der die das und ist nicht ein eine einen mit für auf von zu sie ich es den dem im wie auch werden kann "
    "um sich dir ihnen leider dabei hier dann nach bei mir man du wir zuerst natürlich kein keine oder aus "
    "wird darf einem",
    "fr": "le la les et est une un des pas vous pour dans que qui je ne ce avec sur au du il en votre plus cette "
    "peux suis voici à mais nous sont ou elle aux cela d'abord puis bien n'est c'est l'eau de désolé sûr",
    "es": "el la los las que de y en un una no para con por es lo se puedo su al del como más este esta puede usted "
    "pero aquí tu te siento yo eso hacer primero luego sobre está ayudarte hay sin son tiene",
    "it": "il lo la gli che di e un una non per con è del della sono mi si come questo questa puoi posso ma nel "
    "alla al dei delle dispiace ecco aiutarti poi anche le prima i da su tuo più ti ciò fare",
    "pt": "o os as que de e em um uma não para com por é do da no na se posso você mais como este esta isso mas ao "
    "seu sua pode aqui ajudar dos das eu primeiro depois são está lhe nos fazer à água",
    "nl": "de het een en van ik niet is dat op te in je met voor zijn die er aan kan geen om u dit maar ook deze "
    "wat naar mij kunt hier dan bij helpen eerst spijt wij mijn uw daar door moet worden heb",
    "pl": "nie w na i z do że się to jest mogę jak o dla po aby ale przez tego są od za jako możesz ten tym co oto "
    "ci lub oraz pomóc przykro mi jestem tej ich wody najpierw potem być może tylko",
    "sv": "och att det som en är på för av med jag inte kan till den ett du om här hjälpa tyvärr har från eller så vi",
    "da": "og at det som en er på for af med jeg ikke kan til den et du om her hjælpe desværre har fra eller så vi mig",
    "no": "og å det som en er på for av med jeg ikke kan til den et du om her hjelpe dessverre har fra eller så vi meg",
    "fi": "ja on ei se että en voi olen auttaa tämä minä ole mutta niin kun voit sitä myös tai valitettavasti",
    "cs": "je že se na v nemohu jsem to s pro ale jak není by jako do za tak můžete omlouvám nebo od vám si po aby",
    "ro": "și să nu pot este pe în cu la de care un o pentru mai din îmi pare rău că sunt dar te poți acest",
    "hu": "az és nem hogy egy is van meg ez el tudok segíteni sajnálom de lehet ha ezt vagy mert már csak",
    "tr": "ve bir bu için ile de da değil ben çok ne olarak üzgünüm yardımcı olamam daha ama gibi size bunu var",
    "id": "yang dan di untuk tidak dengan ini dari saya anda bisa dalam itu adalah akan maaf pada atau ke dapat "
    "membantu",
    "vi": "và của là không tôi có thể cho này được với một bạn các trong xin lỗi để những như đã về giúp khi",
    "ca": "el els les que de i en un una no per amb és ho puc ajudar-te però aquest més com sense molt també ser "
    "del als",
    "sw": "na ya wa kwa ni katika hii siwezi samahani kukusaidia hiyo za cha ili au lakini kama hilo mimi",
    "tl": "ang ng sa na ay mga hindi ko po ako ikaw ito para kung at pero paumanhin matulungan ka iyan nang may",
}
_SCRIPTS = (
    *(("HIRAGANA", "ja"), ("KATAKANA", "ja"), ("HANGUL", "ko"), ("CJK", "zh"), ("ARABIC", "ar"), ("DEVANAGARI", "hi")),
    *(("CYRILLIC", "ru"), ("GREEK", "el"), ("HEBREW", "he"), ("THAI", "th"), ("BENGALI", "bn"), ("TAMIL", "ta")),
    *(("TELUGU", "te"), ("GUJARATI", "gu"), ("GURMUKHI", "pa"), ("KANNADA", "kn"), ("MALAYALAM", "ml")),
    *(("GEORGIAN", "ka"), ("ARMENIAN", "hy"), ("ETHIOPIC", "am"), ("KHMER", "km"), ("LAO", "lo"), ("MYANMAR", "my")),
    *(("SINHALA", "si"), ("TIBETAN", "bo"), ("MONGOLIAN", "mn"), ("ORIYA", "or")),
)
_NEIGHBOURS = {  # letters and words of languages that share a script
    "ru": (
        ("uk", r"[іїєґ]|\b(?:вибачте|можу|цим|це|та|допомогти)\b"),
        ("sr", "[јљњћђџ]"),
        ("kk", "[қғңүұһ]"),
        ("bg", r"\b(?:не мога|съжалявам|да|се|това)\b.*ъ"),
    ),
    "ar": (("ur", "[ٹڈڑےں]"), ("fa", "[پچژگکی]")),
    "hi": (("mr", r"(?:आहे|नाही|मला|आणि)"), ("ne", r"(?:छैन|गर्न|हुन्छ|तपाईं)")),
}
_SIGNS = {  # letters and endings that few other languages have; each word with one counts as a stop word
    "de": re.compile("ß|^nicht|ung$|lich$|keit$"),
    "fr": re.compile("œ|^[ldnsjmtc]'|^qu'|eux$|ez$|^é"),
    "es": re.compile("ñ|ción$|dad$"),
    "it": re.compile("zion[ei]$|[^aeiou]ò$|gli|^dell'|^un'|ità$"),
    "pt": re.compile("[ãõ]|lh[aeo]"),
    "nl": re.compile("ij[^aeiou]|aa|ee[nr]$|oek|^ge.*d$"),
    "pl": re.compile("[łżąęśźń]|sz|cz|rz"),
    "cs": re.compile("[řěů]"),
    "sv": re.compile("å"),
    "da": re.compile("[øæ]"),
    "no": re.compile("[øæ]"),
    "tr": re.compile("[ığş]"),
    "hu": re.compile("[őű]"),
    "ro": re.compile("[țşșţă]"),
    "vi": re.compile("[ạảấầẩẫậắằẳẵặẹẻẽếềểễệịỉọỏốồổỗộớờởỡợụủứừửữựỳỷỹđơư]"),
    "fi": re.compile("ää|yy|ään$|ssa$|ssä$"),
}
NAMES = {
    "en": "English",
    "sv": "Swedish",
    "da": "Danish",
    "no": "Norwegian",
    "fi": "Finnish",
    "cs": "Czech",
    "ro": "Romanian",
    "hu": "Hungarian",
    "tr": "Turkish",
    "id": "Indonesian",
    "vi": "Vietnamese",
    "ca": "Catalan",
    "sw": "Swahili",
    "tl": "Tagalog",
    "el": "Greek",
    "he": "Hebrew",
    "th": "Thai",
    "bn": "Bengali",
    "ta": "Tamil",
    "te": "Telugu",
    "gu": "Gujarati",
    "pa": "Punjabi",
    "kn": "Kannada",
    "ml": "Malayalam",
    "ka": "Georgian",
    "hy": "Armenian",
    "am": "Amharic",
    "km": "Khmer",
    "lo": "Lao",
    "my": "Burmese",
    "si": "Sinhala",
    "bo": "Tibetan",
    "mn": "Mongolian",
    "or": "Odia",
    "uk": "Ukrainian",
    "sr": "Serbian",
    "kk": "Kazakh",
    "bg": "Bulgarian",
    "ur": "Urdu",
    "fa": "Persian",
    "mr": "Marathi",
    "ne": "Nepali",
}
"""English names of the languages that have no rules, and of English."""
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
_ENOUGH_FOREIGN = 0.3  # an English answer may quote a foreign word
_ENOUGH_WORDS = 1.8
_ENOUGH_SHARE = 0.15
_FEW_WORDS = 6
ENGLISH = "en"


def language_of(text: str) -> str | None:
    """Return the code of the language that the text seems to have, or None where nothing tells."""
    text = text.lower().replace("’", "'")
    scripts = Counter(_script_of(letter) for letter in text if letter.isalpha())
    if not scripts:
        return None
    total = scripts.total()
    others = {code: count for code, count in scripts.items() if code != "latin"}
    # A text with kana is Japanese, however many ideographs it has.
    if others.get("ja", 0) >= _ENOUGH_FOREIGN * (others.get("ja", 0) + others.get("zh", 0)) > 0:
        others["ja"] += others.pop("zh", 0)
    code, count = max(others.items(), key=lambda item: item[1], default=("", 0))
    if count >= _ENOUGH_FOREIGN * total:
        return _neighbour(code, text)
    return _by_stop_words(_WORD.findall(text))


@cache
def _script_of(letter: str) -> str:
    name = unicodedata.name(letter, "")
    return next((code for script, code in _SCRIPTS if name.startswith(script)), "latin")


def _neighbour(code: str, text: str) -> str:
    return next((other for other, sign in _NEIGHBOURS.get(code, ()) if re.search(sign, text)), code)


def _by_stop_words(words: list[str]) -> str | None:
    hits = {code: _hits(code, words) for code in _STOP_WORDS}
    ranked = sorted(hits, key=lambda code: (-hits[code], code != ENGLISH))
    best, second = ranked[:2]
    clear = hits[best] > hits[second] or best == ENGLISH
    enough = hits[best] >= _ENOUGH_WORDS or (hits[best] > 0 and len(words) <= _FEW_WORDS and clear)
    return best if enough and hits[best] >= _ENOUGH_SHARE * len(words) else None


def _hits(code: str, words: list[str]) -> float:
    stop, sign = _stop_words()[code], _SIGNS.get(code)
    return sum(1 if word in stop else 0.9 if sign is not None and sign.search(word) else 0 for word in words)


@cache
def _stop_words() -> dict[str, frozenset[str]]:
    return {code: frozenset(words.split()) for code, words in _STOP_WORDS.items()}
