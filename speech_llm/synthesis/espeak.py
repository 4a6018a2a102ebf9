"""eSpeak NG through ctypes: text in, samples or IPA phonemes out, the same bytes for the same request.

The library keeps voice, parameters, the phase of its oscillators and a random generator between calls, and none of
its functions resets them all: the same sentence spoken twice differs. So every call opens the library afresh, seeds it,
and unloads it again, which costs about 8 ms. The interface is eSpeak NG's `speak_lib.h` and `espeak_ng.h`.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from speech_llm import assets
from speech_llm.errors import UserError, nearest

SAMPLE_RATE_HZ = 22_050
# A language name of the library for each English accent that it has.
ACCENTS = {"American": "en-us", "British": "en-gb-x-rp", "Scottish": "en-gb-scotland", "Caribbean": "en-029"}

_SYNCHRONOUS = (
    2  # AUDIO_OUTPUT_SYNCHRONOUS: samples go to a callback, and the call returns when all are there
)
_DONT_EXIT = 0x8000  # espeakINITIALIZE_DONT_EXIT: report missing data instead of ending the process
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4  # espeak_PARAMETER
_UTF8 = 1  # espeakCHARS_UTF8
_IPA = 0x02  # phoneme mode: International Phonetic Alphabet
_SEED = 1
_OK = 0  # EE_OK
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

# The library's state is the process's, so one call at a time.
_one_at_a_time = threading.Lock()


def synthesize(
    text: str, voice: str, words_per_minute: int = 175, pitch: int = 50, pitch_range: int = 50
) -> np.ndarray:
    """Samples of shape (n,), float32 in [-1, 1] at `SAMPLE_RATE_HZ`.

    `voice`: a language, or one with a variant, e.g. `en-us+f3`. `words_per_minute`: 80 to 450. `pitch` and
    `pitch_range`: 0 to 100, 50 as the voice is defined. Raises `UserError` for a voice that does not exist, or when
    the library cannot be had.
    """
    blocks: list[np.ndarray] = []

    def collect(samples: Any, count: int, events: int | None) -> int:
        if samples and count > 0:
            blocks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    callback = _CALLBACK(collect)  # must outlive the call
    with _opened(voice) as library:
        library.espeak_SetSynthCallback(callback)
        for parameter, value in (
            (_RATE, words_per_minute),
            (_VOLUME, 100),
            (_PITCH, pitch),
            (_RANGE, pitch_range),
        ):
            library.espeak_SetParameter(parameter, int(value), 0)
        data = text.encode() + b"\0"
        status = library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 1, 0, _UTF8, None, None)
        if status != _OK:
            raise UserError(f"eSpeak NG could not speak {text!r} with voice {voice} (status {status})")
    return np.concatenate([np.zeros(0, np.int16), *blocks]).astype(np.float32) / 32768.0


def phonemes(text: str, voice: str = "en-us") -> str:
    """IPA of the text, e.g. `ðɪ ˈoʊld mˈæn`; clauses are joined by a space. Raises `UserError` as `synthesize`."""
    clauses = []
    with _opened(voice) as library:
        library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        rest = ctypes.c_char_p(text.encode())
        while rest.value:  # the library moves the pointer on by a clause, at the end to NULL
            clauses.append(library.espeak_TextToPhonemes(ctypes.byref(rest), _UTF8, _IPA).decode().strip())
    return " ".join(clause for clause in clauses if clause)


@contextmanager
def _opened(voice: str) -> Iterator[Any]:
    """The library in its first state, with the voice set; unloaded afterwards. Raises `UserError`."""
    folder = assets.resolve(assets.ESPEAK)
    language, _, variant = voice.partition("+")
    # A variant that does not exist would be passed over in silence.
    if variant and not (folder / "espeak-ng-data" / "voices" / "!v" / variant).is_file():
        raise UserError(f"eSpeak NG has no voice variant {variant!r}.{nearest(variant, variants())}")
    name = {"win32": "espeak-ng.dll", "darwin": "libespeak-ng.dylib"}.get(sys.platform, "libespeak-ng.so")
    with _one_at_a_time:
        try:
            library = ctypes.CDLL(str(folder / name))
        except OSError as error:
            raise UserError(f"{folder / name}: the eSpeak NG library cannot be opened ({error})") from None
        try:
            if (
                library.espeak_Initialize(_SYNCHRONOUS, 500, str(folder).encode(), _DONT_EXIT)
                != SAMPLE_RATE_HZ
            ):
                raise UserError(
                    f"{folder}: no usable espeak-ng-data in it; remove the folder to fetch it anew"
                )
            library.espeak_ng_SetRandSeed(ctypes.c_long(_SEED))
            if library.espeak_SetVoiceByName(voice.encode()) != _OK:
                raise UserError(
                    f"eSpeak NG has no voice {language!r}; English ones are {', '.join(ACCENTS.values())}"
                )
            yield library
        finally:
            library.espeak_Terminate()
            _unload(library)


def variants() -> list[str]:
    """The names that may follow the `+` of a voice."""
    folder: Path = assets.resolve(assets.ESPEAK)
    return sorted(path.name for path in (folder / "espeak-ng-data" / "voices" / "!v").iterdir())


def _unload(library: ctypes.CDLL) -> None:
    if sys.platform == "win32":
        ctypes.windll.kernel32.FreeLibrary(ctypes.c_void_p(library._handle))
    else:
        import _ctypes

        _ctypes.dlclose(library._handle)
