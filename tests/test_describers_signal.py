"""The signal describers agree with what is true by construction, and say nothing where there is nothing to say."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile
import soxr

from describers.measure import bursts, exponential_room, in_room, load, medians, mixed
from describers.noise import NoiseDescriber, noise_band
from describers.pitch import PitchDescriber, pitch_band, track
from describers.records import Attribute, Clip
from describers.reverberation import (
    ReverberationDescriber,
    fall_counts,
    impulse_rt60_s,
    reverberation_band,
    steepest_rt60_s,
)
from describers.run import describe_inputs
from describers.signal import SIGNAL_DESCRIBERS
from describers.speech_activity import speech_activity
from describers.tempo import PausesDescriber, SpeedDescriber, count_words, speed_band
from describers.vocabulary import values
from describers.volume import VolumeDescriber, volume_band
from speech_llm.audio import SAMPLE_RATE_HZ

TEXT = "The old man bought a small boat and sailed across the lake. Then he went home to sleep."
ALL = list(SIGNAL_DESCRIBERS)
REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


def clip(samples: np.ndarray, **known: object) -> Clip:
    told = {name: Attribute(value) for name, value in known.items()}
    return Clip(
        "a", Path("a.wav"), len(samples) / SAMPLE_RATE_HZ, np.asarray(samples, np.float32), known=told
    )


def tone(hz: float, seconds: float = 1.5, level: float = 0.1) -> np.ndarray:
    return level * np.sin(2 * np.pi * hz * np.arange(round(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ)


def white(seconds: float, level: float = 0.05) -> np.ndarray:
    return level * np.random.default_rng(0).normal(size=round(seconds * SAMPLE_RATE_HZ))


@lru_cache(maxsize=16)
def spoken(words_per_minute: int = 170, voice: str = "en-us", text: str = TEXT) -> np.ndarray:
    """eSpeak speech at 16 kHz, half a second of silence before and after it."""
    from speech_llm.synthesis import espeak

    speech = 0.3 * espeak.synthesize(text, voice, words_per_minute)
    return np.pad(soxr.resample(speech, espeak.SAMPLE_RATE_HZ, SAMPLE_RATE_HZ), SAMPLE_RATE_HZ // 2)


def everything(sound: Clip) -> dict[str, Attribute]:
    return {
        name: item
        for make in SIGNAL_DESCRIBERS.values()
        for name, item in make().describe([sound])[0].items()
    }


@pytest.mark.parametrize("low_hz", [80.0, 150.0, 250.0])
def test_pitch_follows_a_glide_within_one_percent(low_hz: float) -> None:
    time_s = np.arange(2 * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    true_hz = low_hz * 2 ** (time_s / 3)
    phase = 2 * np.pi * np.cumsum(true_hz) / SAMPLE_RATE_HZ
    harmonics = 0.1 * sum(np.sin(k * phase) / k for k in range(1, 16))
    hz = track(harmonics.astype(np.float32))[5:-5]
    true = np.interp((np.arange(len(hz)) + 5) * 0.016, time_s, true_hz)
    assert (hz > 0).all()
    assert np.abs(hz / true - 1).max() < 0.01


@pytest.mark.parametrize("hz", [80.0, 220.0, 440.0])
def test_a_tone_has_a_pitch_but_no_voice(hz: float) -> None:
    found = PitchDescriber().describe([clip(tone(hz))])[0]
    assert found["pitch_hz"].value == pytest.approx(hz, rel=0.01)
    assert found["pitch_hz"].unit == "Hz"
    assert "no speech" in found["pitch_hz"].how
    assert set(found) == {"pitch_hz"}


@pytest.mark.assets
def test_a_voice_is_high_or_low_for_its_group(espeak_dir: Path) -> None:
    man, woman = (
        PitchDescriber().describe([clip(spoken(voice=voice))])[0] for voice in ("en-us", "en-us+f4")
    )
    assert 60 < man["pitch_hz"].value < 157 < woman["pitch_hz"].value < 300
    assert 1 < man["pitch_range_st"].value < 15
    as_child = PitchDescriber().describe([clip(spoken(voice="en-us"), age_group="child")])[0]
    assert as_child["pitch"].value == "low"
    assert pitch_band(160, {"gender": Attribute("male")})[0] == "high"
    assert pitch_band(160, {"gender": Attribute("female")})[0] == "low"
    assert pitch_band(160, {})[0] == "medium"
    assert (
        pitch_band(119, {"gender": Attribute("male")})[0]
        == pitch_band(207, {"gender": Attribute("female")})[0]
        == "medium"
    )
    assert "women" in pitch_band(200, {"gender": Attribute("female")})[1]


@pytest.mark.assets
def test_a_telephone_takes_the_fundamental_but_not_the_pitch(espeak_dir: Path) -> None:
    telephone = scipy.signal.butter(4, [300, 3400], "bandpass", fs=SAMPLE_RATE_HZ, output="sos")
    whole = spoken()
    thin = scipy.signal.sosfilt(telephone, whole)
    one, other = (PitchDescriber().describe([clip(sound)])[0]["pitch_hz"].value for sound in (whole, thin))
    assert other == pytest.approx(one, rel=0.03)


@pytest.mark.parametrize("offset", [0.0, 0.3])
@pytest.mark.parametrize("level", [0.005, 0.5])
def test_level_is_the_root_mean_square_without_the_offset(level: float, offset: float) -> None:
    found = VolumeDescriber().describe([clip(tone(200, level=level) + offset)])[0]
    assert found["level_dbfs"].value == pytest.approx(20 * np.log10(level / np.sqrt(2)), abs=0.5)
    assert "volume" not in found


@pytest.mark.assets
def test_level_of_speech_leaves_its_pauses_out(espeak_dir: Path) -> None:
    speech = spoken(text="the boat sails over the big lake")
    sounding = np.flatnonzero(np.abs(speech) > 1e-3)
    true_dbfs = 10 * np.log10(np.mean(np.square(speech[sounding[0] : sounding[-1]])))
    padded = np.concatenate([speech, np.zeros(5 * SAMPLE_RATE_HZ, np.float32)])
    found = VolumeDescriber().describe([clip(padded), clip(padded / 10), clip(np.clip(50 * padded, -1, 1))])
    assert found[0]["level_dbfs"].value == pytest.approx(true_dbfs, abs=0.5)
    assert found[0]["level_dbfs"].value - found[1]["level_dbfs"].value == pytest.approx(20, abs=0.2)
    assert [item["volume"].value for item in found] == ["moderate", "quiet", "loud"]


@pytest.mark.parametrize(
    "sound",
    [
        np.zeros(32000),
        np.full(32000, 0.4),
        np.random.default_rng(0).integers(-1, 2, 32000) / 32768,
        np.concatenate([np.zeros(16000), [1.0], np.zeros(16000)]),
        np.zeros(1600),
    ],
    ids=["digital", "offset", "rounding", "one click", "shortest"],
)
def test_silence_gives_nothing_at_all(sound: np.ndarray) -> None:
    found = everything(clip(sound))
    assert {name: item.value for name, item in found.items() if name != "level_dbfs"} == {}


@pytest.mark.parametrize(
    "sound", [white(3), scipy.signal.lfilter([1], [1, -0.97], white(3))], ids=["white", "low"]
)
def test_noise_gets_nothing_of_a_voice(sound: np.ndarray) -> None:
    assert set(everything(clip(sound))) == {"level_dbfs"}


@pytest.mark.assets
@pytest.mark.parametrize("snr_db", [0, 10, 20, 30])
@pytest.mark.parametrize("low", [False, True])
def test_snr_is_the_one_mixed_within_3_db(espeak_dir: Path, snr_db: int, low: bool) -> None:
    noise = white(4)
    noise = scipy.signal.lfilter([1], [1, -0.97], noise) if low else noise
    found = NoiseDescriber().describe([clip(mixed(clip(spoken()), noise, snr_db))])[0]
    assert found["snr_db"].value == pytest.approx(snr_db, abs=3)
    assert "without speech" in found["snr_db"].how


@pytest.mark.assets
@pytest.mark.parametrize("snr_db", [0, 10])
@pytest.mark.parametrize(("on_s", "off_s"), [(0.1, 0.4), (0.3, 0.7)])
def test_noise_that_comes_and_goes_gets_no_number_and_no_wrong_word(
    espeak_dir: Path, snr_db: int, on_s: float, off_s: float
) -> None:
    # As in any recording there is some noise between the bursts too.
    recorded = clip(mixed(clip(np.pad(spoken(), SAMPLE_RATE_HZ)), white(8), 40))
    for seed in range(3):
        coming_and_going = bursts(white(8), on_s, off_s, seed)
        found = NoiseDescriber().describe([clip(mixed(recorded, coming_and_going, snr_db))])[0]
        assert "snr_db" not in found
        assert found.get("noise", Attribute("noisy")).value == "noisy"


@pytest.mark.assets
def test_speech_without_pauses_is_called_noisy_or_clean_but_gets_no_doubtful_number(espeak_dir: Path) -> None:
    bare = spoken(text="All in all we will always allow our own early morning hours and are early")
    bare = bare[SAMPLE_RATE_HZ // 2 + 800 : -SAMPLE_RATE_HZ // 2 - 800]
    noisy, clean = NoiseDescriber().describe([clip(mixed(clip(bare), white(4), 5)), clip(bare)])
    assert noisy["snr_db"].value == pytest.approx(5, abs=3)
    assert noisy["noise"].value == "noisy"
    assert "snr_db" not in clean
    assert clean.get("noise", Attribute("clean")).value == "clean"


@pytest.mark.parametrize("rt60_s", [0.3, 0.8, 1.5])
def test_decay_of_an_impulse_is_exact(rt60_s: float) -> None:
    time_s = np.arange(2 * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    decay = white(2, 0.3) * 10 ** (-3 * time_s / rt60_s)
    assert impulse_rt60_s(decay.astype(np.float32)) == pytest.approx(rt60_s, rel=0.05)
    found = ReverberationDescriber().describe([clip(decay)])[0]
    assert found["rt60_s"].value == pytest.approx(rt60_s, rel=0.05)
    assert "reverberation" not in found
    assert impulse_rt60_s(white(2)) is None
    assert impulse_rt60_s(tone(300)) is None


@pytest.mark.parametrize("rt60_s", [0.3, 0.8])
def test_a_long_recording_takes_the_memory_of_a_short_one_and_has_its_reverberation(
    rt60_s: float,
) -> None:
    time_s = np.arange(SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    decay = white(1, 0.3) * 10 ** (-3 * time_s / rt60_s)
    once, often = fall_counts([(0.0, decay)]), fall_counts((float(k), decay) for k in range(50))
    assert once.nbytes == often.nbytes
    assert steepest_rt60_s(often) == pytest.approx(steepest_rt60_s(once), rel=0.02)
    short, long = steepest_rt60_s(once)
    assert 0.6 * rt60_s < short < long < 1.3 * rt60_s


@pytest.mark.assets
def test_reverberation_of_speech_follows_the_room(espeak_dir: Path) -> None:
    dry = clip(np.concatenate([spoken(), spoken(voice="en-us+f2")]))
    rooms_s = (0.3, 0.6, 1.2)
    heard = [dry, *(clip(in_room(dry, exponential_room(rt60_s, 0))) for rt60_s in rooms_s)]
    found = ReverberationDescriber().describe(heard)
    times = [item["rt60_s"].value for item in found]
    assert times == sorted(times)
    for true_s, told_s in zip(rooms_s, times[1:], strict=True):
        assert told_s == pytest.approx(true_s, abs=0.1 + 0.25 * true_s)
    assert found[0]["reverberation"].value == "dry"
    assert found[-1]["reverberation"].value == "reverberant"
    noisy = ReverberationDescriber().describe([clip(mixed(dry, white(8), 5))])[0]
    assert noisy == {}


@pytest.mark.assets
def test_digital_silence_around_a_clip_changes_neither_its_noise_nor_its_room(espeak_dir: Path) -> None:
    dry = clip(np.concatenate([spoken(), spoken(voice="en-us+f2")]))
    with_offset = 0.9 * mixed(dry, white(8), 12) + 0.002
    in_a_room = in_room(dry, exponential_room(0.5, 0))
    for describer, sound in ((NoiseDescriber(), with_offset), (ReverberationDescriber(), in_a_room)):
        padded = [np.pad(sound, (0, round(s * SAMPLE_RATE_HZ))) for s in (0, 2, 20)]
        alone, *others = describer.describe([clip(samples) for samples in padded])
        number = "snr_db" if "snr_db" in alone else "rt60_s"
        for found in others:
            assert found[number].value == pytest.approx(alone[number].value, rel=0.05)
            assert [name in found and found[name].value for name in describer.attributes[:1]] == [
                name in alone and alone[name].value for name in describer.attributes[:1]
            ]


@pytest.mark.assets
@pytest.mark.parametrize(("words_per_minute", "band"), [(100, "slow"), (170, "normal"), (250, "fast")])
def test_speed_of_known_words_per_minute(espeak_dir: Path, words_per_minute: int, band: str) -> None:
    from speech_llm.synthesis import espeak

    text = "the old man bought a small boat and sailed across the lake to see his friends at home"
    speech = spoken(words_per_minute, text=text)
    sounding = np.flatnonzero(np.abs(speech) > 1e-3)
    true_rate = 60 * count_words(text) / ((sounding[-1] - sounding[0]) / SAMPLE_RATE_HZ)
    by_words, by_nuclei = SpeedDescriber().describe([clip(speech, transcript=text), clip(speech)])
    assert by_words["words_per_minute"].value == pytest.approx(true_rate, rel=0.08)
    assert by_words["speed"].value == band
    syllables = len([sound for sound in espeak.phonemes(text) if sound in "aeiouæɑɐɒɔəɚɛɜɪʊʌᵻ"])
    true_per_s = syllables / ((sounding[-1] - sounding[0]) / SAMPLE_RATE_HZ)
    assert by_nuclei["syllables_per_s"].value == pytest.approx(true_per_s, rel=0.4)
    assert by_nuclei.get("speed", Attribute(band)).value == band


@pytest.mark.assets
def test_speed_needs_words_and_counts_english_ones_only(espeak_dir: Path) -> None:
    speech = spoken()
    german, short = SpeedDescriber().describe(
        [
            clip(speech, transcript="Das ist ein Satz aus Wörtern", language="de"),
            clip(speech, transcript="Yes."),
        ]
    )
    assert "syllables_per_s" in german
    assert "words_per_minute" not in german
    assert short == {}
    assert SpeedDescriber().describe([clip(spoken(text="no"))]) == [{}]
    assert count_words("Call 8885112931, don't wait!") == 13


@pytest.mark.assets
def test_pauses_are_counted_with_their_share(espeak_dir: Path) -> None:
    phrase = spoken(text="The boat sails over the big lake")
    sounding = np.flatnonzero(np.abs(phrase) > 1e-3)
    phrase = phrase[sounding[0] : sounding[-1]]
    gaps_s = (0.6, 1.0)
    parts = [phrase, np.zeros(round(gaps_s[0] * SAMPLE_RATE_HZ)), phrase, np.zeros(round(gaps_s[1] * SAMPLE_RATE_HZ)), phrase]  # fmt: skip
    whole = np.concatenate(parts)
    found = PausesDescriber().describe([clip(np.pad(whole, SAMPLE_RATE_HZ))])[0]
    assert found["pauses"].value == 2
    assert found["pause_share"].value == pytest.approx(sum(gaps_s) / (len(whole) / SAMPLE_RATE_HZ), abs=0.06)
    assert PausesDescriber().describe([clip(phrase)])[0]["pauses"].value == 0


@pytest.mark.assets
def test_clipping_and_offset_change_neither_pitch_nor_speech(espeak_dir: Path) -> None:
    speech = mixed(clip(spoken()), white(4), 35)
    clipped = np.clip(speech * (0.5 / np.abs(speech).max()) * 6, -0.99, 0.99)
    offset = 0.5 * speech + 0.4
    plain, loud, shifted = (everything(clip(sound)) for sound in (speech, clipped, offset))
    assert loud["volume"].value == "loud"
    for other in (loud, shifted):
        assert other["pitch_hz"].value == pytest.approx(plain["pitch_hz"].value, rel=0.03)
        assert other["pauses"].value == plain["pauses"].value
    assert shifted["level_dbfs"].value == pytest.approx(plain["level_dbfs"].value - 6, abs=0.3)
    assert shifted["noise"].value == plain["noise"].value


@pytest.mark.assets
def test_files_of_any_rate_channels_and_name_are_described_alike_or_rejected(
    espeak_dir: Path, tmp_path: Path
) -> None:
    speech = mixed(clip(spoken()), white(4), 30)

    def write(name: str, rate_hz: int, channels: int = 1, kind: str | None = None) -> None:
        sound = soxr.resample(speech, SAMPLE_RATE_HZ, rate_hz)
        soundfile.write(tmp_path / name, np.repeat(sound[:, None], channels, axis=1), rate_hz, format=kind)

    write("a.wav", SAMPLE_RATE_HZ)
    write("b_telephone.wav", 8000)
    write("c_studio.wav", 96000)
    write("d_surround.wav", 48000, channels=6)
    write("e_really_flac.mp3", SAMPLE_RATE_HZ, kind="FLAC")
    write("f_cut.flac", SAMPLE_RATE_HZ)
    whole = (tmp_path / "f_cut.flac").read_bytes()
    (tmp_path / "f_cut.flac").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "g_text.wav").write_text("this is no sound, whatever its name says\n" * 9)
    soundfile.write(tmp_path / "h_silence.wav", np.zeros(SAMPLE_RATE_HZ), SAMPLE_RATE_HZ)
    out = tmp_path / "out.jsonl"
    describe_inputs(tmp_path, out, use=ALL, progress=False)
    rows = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    first = rows["a.wav"]["attributes"]
    for name in ("b_telephone.wav", "c_studio.wav", "d_surround.wav", "e_really_flac.mp3"):
        found = rows[name]["attributes"]
        assert found["pitch_hz"] == pytest.approx(first["pitch_hz"], rel=0.02), name
        assert found["level_dbfs"] == pytest.approx(first["level_dbfs"], abs=1), name
        # Half of the white noise lies above the telephone's band: 3 dB.
        more_db = 3 if name == "b_telephone.wav" else 0
        assert found["snr_db"] == pytest.approx(first["snr_db"] + more_db, abs=1), name
        assert [found[word] for word in ("pitch", "volume", "noise", "pauses")] == [
            first[word] for word in ("pitch", "volume", "noise", "pauses")
        ], name
    assert rows["h_silence.wav"]["attributes"] == {}
    assert rows["h_silence.wav"]["description"] == "Nothing is known about the recording."
    assert set(rows["a.wav"]["how"]) == set(first)
    assert all(rows["a.wav"]["how"].values())
    rejects = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_text().splitlines()]
    assert [Path(row["audio"]).name for row in rejects] == ["f_cut.flac", "g_text.wav"]
    assert all(row["reason"] for row in rejects)


@pytest.mark.assets
def test_a_long_recording_is_measured_in_parts_and_alike(espeak_dir: Path, tmp_path: Path) -> None:
    part = mixed(clip(spoken()), white(4), 20)
    whole = np.tile(part, 10)
    assert len(whole) > 40 * SAMPLE_RATE_HZ
    soundfile.write(tmp_path / "long.wav", whole, SAMPLE_RATE_HZ, subtype="FLOAT")
    streamed = Clip("long", tmp_path / "long.wav", len(whole) / SAMPLE_RATE_HZ, None)
    long, short = everything(streamed), everything(clip(part))
    for name in ("pitch_hz", "syllables_per_s"):
        assert long[name].value == pytest.approx(short[name].value, rel=0.08), name
    for name in ("level_dbfs", "snr_db"):
        assert long[name].value == pytest.approx(short[name].value, abs=1), name
    assert long["pauses"].value > short["pauses"].value
    # What is kept of a recording is small beside its sound.
    kept = speech_activity(streamed)
    assert kept.energy.nbytes + kept.start_s.nbytes < whole.astype(np.float32).nbytes / 50


def test_bands_are_the_words_of_the_vocabulary() -> None:
    pairs: list[tuple[str, Callable[[float], str | None], list[float]]] = [
        ("volume", volume_band, [-50, -26, -10]),
        ("noise", noise_band, [30, 20, 5]),
        ("reverberation", reverberation_band, [0.2, 0.55, 1.2]),
        ("speed", speed_band, [0.5, 1.0, 1.5]),
        ("pitch", lambda hz: pitch_band(hz, {})[0], [100, 150, 250]),
    ]
    for attribute, band, given in pairs:
        assert [band(value) for value in given] == values(attribute)
    assert reverberation_band(0.41) is None
    assert speed_band(1.2, margin=1.1) is None


@pytest.mark.real_audio
@pytest.mark.skipif(not REAL.is_dir(), reason="the development recordings are not beside the checkout")
def test_pitch_of_real_men_and_women_lies_where_the_literature_has_it() -> None:
    clips = load([REAL / "librispeech_gender" / "metadata.jsonl"], 16, gender=...)
    for gender, low_hz, high_hz in (("male", 90, 140), ("female", 165, 230)):
        hz = medians([sound for sound in clips if sound.row["gender"] == gender])
        assert low_hz < np.nanmedian(hz) < high_hz
