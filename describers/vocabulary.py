"""The words for what is heard: how an attribute and its values are called, and which other words mean the same.

Descriptions take the display names from here; verification of targets and scoring of answers take the synonyms.
An attribute or a value that is not listed is simply itself.
"""

from __future__ import annotations

import re
from typing import Any

# value -> other words that a listener may use for it. The value itself always counts as its first synonym. A word
# stands under one value of its attribute only, and never where it would also be an everyday word of an answer.
SYNONYMS: dict[str, dict[str, list[str]]] = {
    "gender": {
        "female": ["woman", "women", "females", "lady", "ladies", "girl", "feminine", "woman's", "girl's"],
        "male": ["man", "men", "males", "gentleman", "guy", "boy", "masculine", "man's", "boy's"],
    },
    "accent": {
        "American": [
            "US",
            "U.S.",
            "USA",
            "United States",
            "North American",
            "General American",
            "US English",
        ],
        "British": ["UK", "Britain", "England", "Received Pronunciation", "RP", "Briton"],
        "Scottish": ["Scots", "Scotland", "Scotch", "Scotsman", "Scotswoman"],
        "Caribbean": ["West Indian", "West Indies", "Jamaican", "Jamaica", "Trinidadian", "Barbadian"],
        "Irish": ["Ireland"],
        "Welsh": ["Wales"],
        "Australian": ["Australia", "Aussie"],
        "New Zealand": ["New Zealander", "Kiwi"],
        "Canadian": ["Canada"],
        "South African": ["South Africa"],
        "Indian": ["India", "South Asian"],
        "Mandarin": ["Chinese", "China"],
        "German": ["Germany"],
        "French": ["France"],
        "Belgian French": ["Belgian", "Belgium"],
        "Spanish": ["Spain", "Hispanic"],
        "Mexican Spanish": ["Mexican", "Mexico"],
        "Italian": ["Italy"],
        "Russian": ["Russia"],
        "Greek": ["Greece"],
        "Korean": ["Korea"],
        "Arabic": ["Arab"],
    },
    "speed": {
        "slow": ["slowly", "slower", "unhurried", "leisurely", "slow-paced"],
        "normal": ["normally", "moderate", "moderately", "average", "medium", "regular", "ordinary", "usual"],
        "fast": [
            "quickly",
            "quick",
            "rapid",
            "rapidly",
            "faster",
            "hurried",
            "hurriedly",
            "fast-paced",
            "swiftly",
            "speedy",
        ],
    },
    "emotion": {
        "neutral": ["unemotional", "emotionless", "flat", "matter-of-fact"],
        "calm": ["calmly", "relaxed", "peaceful", "serene", "composed", "tranquil"],
        "happy": [
            "happily",
            "happiness",
            "joy",
            "joyful",
            "joyous",
            "cheerful",
            "cheerfully",
            "glad",
            "delighted",
        ],
        "sad": ["sadly", "sadness", "sorrow", "sorrowful", "unhappy", "melancholy", "gloomy", "mournful"],
        "angry": ["angrily", "anger", "furious", "mad", "irate", "enraged", "rage"],
        "fearful": ["fearfully", "fear", "afraid", "scared", "frightened", "anxious", "terrified"],
        "disgust": ["disgusted", "disgustedly", "revolted", "repulsed", "revulsion"],
        "surprised": ["surprise", "astonished", "amazed", "astonishment", "startled", "shocked"],
    },
    "event": {
        "dog bark": ["dog barking", "barking dog", "dog", "barking", "bark", "barks", "dogs"],
        "sea waves": ["waves", "sea", "ocean", "ocean waves", "surf", "waves crashing"],
        "helicopter": ["helicopters", "chopper", "rotor", "helicopter's"],
        "person sneeze": ["sneeze", "sneezing", "sneezes", "person sneezing"],
        "rooster": ["roosters", "cock", "cockerel", "crowing", "crow of a rooster", "rooster's"],
        "clock tick": ["clock", "ticking", "clock ticking", "tick", "ticking clock", "tick-tock"],
        "chainsaw": ["chain saw", "chainsaws", "chainsaw's"],
        "fire crackling": ["fire", "crackling", "crackling fire", "campfire", "bonfire", "flames"],
        "baby cry": ["baby", "crying baby", "baby crying", "infant", "baby's cry", "infant crying"],
        "rain": ["raining", "rainfall", "raindrops", "rainy", "downpour"],
        "bus": ["buses", "coach"],
        "hens": ["hen", "chicken", "chickens", "clucking"],
        "sheep": ["bleating", "lamb", "baa"],
        "kitchen": ["kitchen noise", "dishes"],
    },
    "keyword": {
        "zero": ["0", "nought"],
        "one": ["1"],
        "two": ["2"],
        "three": ["3"],
        "four": ["4"],
        "five": ["5"],
        "six": ["6"],
        "seven": ["7"],
        "eight": ["8"],
        "nine": ["9"],
        **{
            word: []
            for word in [
                "bed",
                "bird",
                "cat",
                "dog",
                "down",
                "go",
                "happy",
                "house",
                "left",
                "marvin",
                "no",
                "off",
                "on",
                "right",
            ]
        },
        **{word: [] for word in ["sheila", "stop", "tree", "up", "wow", "yes"]},
    },
    "age_group": {
        "child": ["children", "kid", "kids", "young child", "child's"],
        "teenager": ["teen", "teenage", "adolescent", "youth"],
        "adult": ["adults", "grown-up", "grown up", "middle-aged", "adult's"],
        "senior": ["elderly", "old", "older", "aged"],
    },
    "language": {
        "en": ["English"],
        "de": ["German"],
        "es": ["Spanish"],
        "fr": ["French"],
        "it": ["Italian"],
        "ru": ["Russian"],
        "pt": ["Portuguese"],
        "nl": ["Dutch"],
        "pl": ["Polish"],
        "tr": ["Turkish"],
        "zh": ["Chinese", "Mandarin"],
        "ja": ["Japanese"],
        "ko": ["Korean"],
        "ar": ["Arabic"],
        "hi": ["Hindi"],
        "uk": ["Ukrainian"],
        "sv": ["Swedish"],
        "cs": ["Czech"],
        "el": ["Greek"],
        "vi": ["Vietnamese"],
        "id": ["Indonesian"],
        "th": ["Thai"],
        "fa": ["Persian", "Farsi"],
        "he": ["Hebrew"],
        "ca": ["Catalan", "Valencian"],
        "fi": ["Finnish"],
        "ms": ["Malay"],
        "ro": ["Romanian"],
        "da": ["Danish"],
        "hu": ["Hungarian"],
        "ta": ["Tamil"],
        "no": ["Norwegian"],
        "ur": ["Urdu"],
        "hr": ["Croatian"],
        "bg": ["Bulgarian"],
        "lt": ["Lithuanian"],
        "la": ["Latin"],
        "mi": ["Maori"],
        "ml": ["Malayalam"],
        "cy": ["Welsh"],
        "sk": ["Slovak"],
        "te": ["Telugu"],
        "lv": ["Latvian"],
        "bn": ["Bengali"],
        "sr": ["Serbian"],
        "az": ["Azerbaijani"],
        "sl": ["Slovenian"],
        "kn": ["Kannada"],
        "et": ["Estonian"],
        "mk": ["Macedonian"],
        "br": ["Breton"],
        "eu": ["Basque"],
        "is": ["Icelandic"],
        "hy": ["Armenian"],
        "ne": ["Nepali"],
        "mn": ["Mongolian"],
        "bs": ["Bosnian"],
        "kk": ["Kazakh"],
        "sq": ["Albanian"],
        "sw": ["Swahili"],
        "gl": ["Galician"],
        "mr": ["Marathi"],
        "pa": ["Punjabi"],
        "si": ["Sinhala"],
        "km": ["Khmer"],
        "sn": ["Shona"],
        "yo": ["Yoruba"],
        "so": ["Somali"],
        "af": ["Afrikaans"],
        "oc": ["Occitan"],
        "ka": ["Georgian"],
        "be": ["Belarusian"],
        "tg": ["Tajik"],
        "sd": ["Sindhi"],
        "gu": ["Gujarati"],
        "am": ["Amharic"],
        "yi": ["Yiddish"],
        "lo": ["Lao"],
        "uz": ["Uzbek"],
        "fo": ["Faroese"],
        "ht": ["Haitian Creole"],
        "ps": ["Pashto"],
        "tk": ["Turkmen"],
        "nn": ["Nynorsk", "New Norwegian"],
        "mt": ["Maltese"],
        "sa": ["Sanskrit"],
        "lb": ["Luxembourgish"],
        "my": ["Burmese", "Myanmar"],
        "bo": ["Tibetan"],
        "tl": ["Tagalog", "Filipino"],
        "mg": ["Malagasy"],
        "as": ["Assamese"],
        "tt": ["Tatar"],
        "haw": ["Hawaiian"],
        "ln": ["Lingala"],
        "ha": ["Hausa"],
        "ba": ["Bashkir"],
        "jv": ["Javanese"],
        "su": ["Sundanese"],
        "yue": ["Cantonese"],
    },
    "volume": {
        "quiet": ["quietly", "soft", "softly", "low volume", "whisper", "whispering"],
        "moderate": ["moderate volume", "medium volume", "average volume", "normal volume"],
        "loud": ["loudly", "shouting", "high volume"],
    },
    "pitch": {
        "low": ["low-pitched", "deep", "deeper"],
        "medium": ["medium-pitched", "mid-pitched", "moderate pitch", "average pitch"],
        "high": ["high-pitched", "higher", "shrill"],
    },
    "noise": {
        "clean": ["noise-free", "noiseless", "no noise", "no background noise"],
        "slightly noisy": ["a little noisy", "somewhat noisy", "slight noise", "some noise", "mild noise"],
        "noisy": ["very noisy", "full of noise", "strong noise", "loud noise", "lots of noise"],
    },
    "reverberation": {
        "dry": ["echo-free", "echoless", "no echo", "no reverberation"],
        "slightly reverberant": [
            "slight echo",
            "a little echo",
            "some echo",
            "slight reverberation",
            "some reverberation",
        ],
        "reverberant": ["echoing", "echoey", "strong echo", "strong reverberation", "very reverberant"],
    },
}

# Label spellings met in the wild that are no words of an answer ("f", "anger" as a class name) -> our value.
ALIASES: dict[str, dict[str, str]] = {
    "gender": {"f": "female", "m": "male"},
    "accent": {"us": "American", "uk": "British", "gb": "British", "scotland": "Scottish", "in": "Indian"},
    "emotion": {
        "ang": "angry",
        "hap": "happy",
        "neu": "neutral",
        "fea": "fearful",
        "sur": "surprised",
        "dis": "disgust",
    },
    "speed": {"medium": "normal"},
    "pitch": {"moderate": "medium", "average": "medium", "mid": "medium"},
    "volume": {"medium": "moderate", "average": "moderate", "normal": "moderate"},
    "age_group": {"old": "senior", "kid": "child"},
}

# attribute -> its name in a description; any other attribute is its own name with spaces for underscores.
NAMES: dict[str, str] = {
    "age_group": "age group",
    "event": "sound event",
    "num_speakers": "number of speakers",
    "native_language": "native language",
    "snr_db": "signal-to-noise ratio",
    "speed": "speaking speed",
    "noise": "noise level",
    "pitch_hz": "median pitch",
    "pitch_range_st": "pitch range",
    "level_dbfs": "level",
    "words_per_minute": "speaking rate",
    "syllables_per_s": "syllable rate",
    "pause_share": "share of pauses",
    "rt60_s": "reverberation time",
}

# (attribute, value) -> how a description writes it, where that is not the value itself.
DISPLAY: dict[str, dict[str, str]] = {
    "emotion": {"disgust": "disgusted"},
    "language": {code: words[0] for code, words in SYNONYMS["language"].items()},
    "age_group": {"senior": "elderly"},
}


def values(attribute: str) -> list[str]:
    """The known values of an attribute; an empty list for an attribute that is not listed."""
    return list(SYNONYMS.get(attribute, {}))


def synonyms(attribute: str, value: Any) -> list[str]:
    """Words that mean `value`, without repetition: the value itself first, then how it is displayed, then the others.

    A language code is no word of an answer ("it", "de"), so languages begin with their name.
    """
    known = canonical(attribute, value)
    itself = [] if attribute == "language" and known in SYNONYMS["language"] else [str(value), known]
    words = [*itself, display(attribute, value), *SYNONYMS.get(attribute, {}).get(known, [])]
    return list({word.casefold(): word for word in reversed(words)}.values())[::-1]


# What people and libraries write where a label is missing.
MISSING = ("", "nan", "none", "null", "n/a", "na", "unknown", "undefined", "?", "-")


def is_missing(attribute: str, value: Any) -> bool:
    """Whether a table's cell says nothing about an attribute: empty, NaN, "unknown". What somebody said may be such a word."""
    if value is None or (isinstance(value, float) and value != value):
        return True
    if not isinstance(value, str):
        return False
    return value.strip() == "" if attribute == "transcript" else value.strip().casefold() in MISSING


def canonical(attribute: str, value: Any) -> str:
    """The listed value that a label means ("F" -> "female", "Anger" -> "angry"); the label itself when none is."""
    text = str(value).strip()
    folded = text.casefold()
    for known in values(attribute):
        if folded == known.casefold():
            return known
    aliases = ALIASES.get(attribute, {})
    if folded in aliases:
        return aliases[folded]
    for known, words in SYNONYMS.get(attribute, {}).items():
        if folded in (word.casefold() for word in words):
            return known
    if attribute == "accent":
        shorter = _bare_accent(text)
        return text if shorter == text else canonical(attribute, shorter)
    return text


def display(attribute: str, value: Any) -> str:
    """How a description writes a value: `display("language", "de")` is "German", an accent loses its "English"."""
    known = canonical(attribute, value)
    return DISPLAY.get(attribute, {}).get(known, known)


def display_name(attribute: str) -> str:
    """How a description names an attribute: `age_group` is "age group"."""
    return NAMES.get(attribute, attribute.replace("_", " "))


def _bare_accent(text: str) -> str:
    """ "Mandarin-accented English (non-native)" -> "Mandarin"; "North American English" -> "North American"."""
    text = re.sub(r"\s*\((?:non-)?native\)\s*$", "", text)
    text = re.sub(r"^French \(Belgium\)", "Belgian French", text)
    text = re.sub(r"[- ]accented(?: English)?$", "", text)
    bare = re.sub(r"\s+(?:English|accent)$", "", text)
    return text if bare == "native" else bare
