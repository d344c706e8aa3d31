"""Code point classes of the pre-tokenizer regexes, the same on every Python version.

The ids of a byte-level BPE model depend on which characters count as letters, numbers, marks,
punctuation, symbols and white space. ``unicodedata`` answers by the Unicode version of the running
Python (14.0 in 3.11, 16.0 in 3.14), llama.cpp, whose ids ours must equal, by a table of Unicode
15.1: characters assigned in between would be split differently. So the classes of Unicode 15.1 are
kept here, run-length encoded: a class letter and the number of code points (1 when absent), from
U+0000 to U+10FFFF.

``l`` letter (L*), ``n`` number (N*), ``m`` mark (M*), ``p`` punctuation (P*), ``s`` symbol (S*),
``w`` white space (White_Space property), ``o`` everything else, unassigned code points included.
"""

import re
from functools import cache

import numpy as np
import numpy.typing as npt

# Text is "collapsed" before a class-based regex runs over it: one Latin-1 character per code point,
# ASCII kept, every other code point replaced by a stand-in for its class. White space becomes a
# vertical tab, so that ``\s`` needs no Unicode mode.
NUMBER, LETTER, PUNCTUATION, MARK, SYMBOL, OTHER = "\xd1", "\xd2", "\xd3", "\xd4", "\xd5", "\xd0"
HAN_LETTER, HAN_OTHER = "\xd6", "\xd7"
_STAND_IN = {
    "l": LETTER,
    "n": NUMBER,
    "m": MARK,
    "p": PUNCTUATION,
    "s": SYMBOL,
    "w": "\x0b",
    "o": OTHER,
}

# The blocks a pre-tokenizer that treats Chinese apart (kimi-k2) calls Han, as [first, last].
_HAN = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2EBEF),
    (0x2F800, 0x2FA1F),
)

_WIDE_SPACE = re.compile("[\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")


@cache
def _table(han: bool) -> npt.NDArray[np.uint8]:
    """uint8[0x110000]: the stand-in of every code point; with ``han`` those have their own."""
    runs = re.findall(r"([a-z])(\d*)", _RUNS)
    kinds = np.array([ord(_STAND_IN[kind]) for kind, _ in runs], dtype=np.uint8)
    table = np.repeat(kinds, [int(length or 1) for _, length in runs])
    assert table.size == 0x110000
    if han:
        for first, last in _HAN:
            block = table[first : last + 1]
            block[:] = np.where(block == ord(LETTER), ord(HAN_LETTER), ord(HAN_OTHER))
    table[:128] = np.arange(128, dtype=np.uint8)
    return table


def collapse(text: str, han: bool = False) -> str:
    """One Latin-1 character per code point of ``text`` (no surrogates): itself or its class."""
    if text.isascii():
        return text
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    classes: bytes = _table(han)[points].tobytes()
    return classes.decode("latin-1")


def narrow_spaces(text: str) -> str:
    """``text`` with every white space above ASCII turned into a vertical tab."""
    return text if text.isascii() else _WIDE_SPACE.sub("\x0b", text)


_RUNS = (
    "o9w5o18wp3sp6sp4n10p2s3p2l26p3spsl26pspso6wo26wps5ps2lpsos4n2slp2snlpn3pl23sl31sl458s4l12s14"
    "l5s7lsls17m112l5sl2o2l4plo4s2lpl3olol20ol83sl139sm7l166ol38o2lp6l41p2o2s3om45pmpm2pm2pmo8l27"
    "o4l4p2o17s3p2sp2s2m11pop3l43m21n10p4l2ml99plm7osm6l2m2sm4l2n10l3s2lp14o2lml30m27o2l89m11lo14"
    "n10l33m9l2sp3lo2ms2l22m4lm9lm3lm5o2p15ol25m3o2pol11o5l24sl6o9m8l42m24om33l54m3lm18lm7l10m2p2"
    "n10pl16m3ol8o2l2o2l22ol7olo3l4o2mlm7o2m2o2m3lo8mo4l2ol3m2o2n10l2s2n6s2lpmo2m3ol6o4l2o2l22ol7"
    "ol2ol2ol2o2mom5o4m2o2m3o3mo7l4olo7n10m2l3mpo10m3ol9ol3ol22ol7ol2ol5o2mlm8om3om3o2lo15l2m2o2"
    "n10pso7lm6om3ol8o2l2o2l22ol7ol2ol5o2mlm7o2m2o2m3o7m3o4l2ol3m2o2n10sln6o10mlol6o3l3ol4o3l2olo"
    "l2o3l2o3l3o3l12o4m5o3m3om4o2lo6mo14n13s8o5m5l8ol3ol23ol16o2mlm7om3om4o7m2ol3o2lo2l2m2o2n10o7"
    "pn7slm3pl8ol3ol23ol10ol5o2mlm7om3om4o7m2o6l2ol2m2o2n10ol2mo12m4l9ol3ol41m2lm7om3om4lso4l3mn7"
    "l3m2o2n19sl6om3ol18o3l24ol9olo2l7o3mo4m6omom8o6n10o2m2po12l48ml2m7o4sl7m8pn10p2o37l2olol5o"
    "l24olol10ml2m9lo2l5olom7on10o2l4o32ls3p15sps3m2s6n20smsmsmp4m2l8ol36o4m20pm2l5m11om36os8ms6o"
    "s2p5s4p2o37l43m20ln10p6l6m4l4m3lm3l2m7l3m4l13m12lmn10m4s2l38olo5lo2l43pl333ol4o2l7olol4o2l41"
    "ol4o2l33ol4o2l7olol4o2l15ol57ol4o2l67o2m3p9n20o3l16s10o6l86o2l6o2pl620spl17wl26p2o3l75p3n3l8"
    "o7l18m4o9l19m3p2o9l18m2o12l13ol3om2o12l52m32p3lp3slmo2n10o6n10o6p11m3omn10o6l89o7l5m2l34mlo5"
    "l70o10l31om12o4m12o4so3p2n10l30o2l5o11l44o4l26o6n11o3s34l23m5o2p2l53m10om29o2mn10o6n10o6p7l"
    "p6o2m31o49m5l47m17l8o3n10p7s10m9s9p2om3l30m13l2n10l44m14o8p4l36m20o3p5n10o3l3n10l36p2l9o7l43"
    "o2l3p8o8m3pm21l4ml6ml2m3lo5l192m64l278o2l6o2l38o2l6o2l8olololol31o2l53ol7sls3l3ol7s3l4o2l6o"
    "s3l13s3o2l3ol7s2ow11o5p24w2o5wp20sp13sp12wo16nlo2n6s3p2ln10s3p2ol13o3s33o15m33o15s2ls4ls2l10"
    "sls3l5s6lslslsl4sl11s2l4s5l5s4lsn51l2n5s2o4s376p4s29p2s252o25s11o21n60s78n22s616p14n30s49p2"
    "s31p10s403p22s63p4s32p2s374o2s32os105l229s6l4m3l2o5p4np2l38olo5lo2l56o7lpo14ml23o9l7ol7ol7o"
    "l7ol7ol7ol7ol7om32p47lp32s2p12o34s26os89o12s214o26s16wp3sl2np10s2p12sn9m6pl5s2n3l2ps2ol86o2"
    "m2s2l3pl90pl4o5l43ol94os2n4s10l32s36o11sl16s31on10s30n8sn15s32n10s39n15s320l6592s64l22157o3"
    "s55o9l46p2l269p3l16n10l2o20l47m4pm10pl31m2l70n10m2p6o8s23l9s2l103s2l64o5l2olol5o24l16ml3ml4m"
    "l23m5s4mo3n6s4o6l52p4o8m2l50m18o8p2n10o6m18l6p3lpl2mn10l28m8p2l23m13o11pl29o3m4l47m14p13ol"
    "n10o4p2l5ml10n10l5ol41m14o9l3ml8m2o2n10o2p4l23s3lm3l50mlm3l2m2l5m2lmlo24l3p2l11m5p2l3m2o10l6"
    "o2l6o2l6o9l7ol7ol43sl14s2o4l115m8pm2o2n10o6l11172o12l23o4l49o8452l366o2l106o38l7o12l5o5lml10"
    "sl13ol5olol2ol2ol108s17o16l363p2s16l64o2l54o7so32l12s4m16p10o6m16p35op14sps3opsp2o4l5ol135o4"
    "p3sp6sp4n10p2s3p2l26p3spsl26pspsp7l89o3l6o2l6o2l6o2l3o3s7os7o13s2o2l12ol26ol19ol2ol15o2l14"
    "o34l123o5p3o4n45o3s9n57s17n2s3os13o3so47s45mo130l29o3l49o15mn27o4l32n4o9l20nl8no5l38m5o5l30o"
    "pl36o4l8pn5o42l158o2n10o6l36o4l36o4l40o8l52o11pl11ol15ol7ol2ol11ol15ol7ol2o67l311o9l22o10l8"
    "o24l6ol42ol9o69l6o2lol44ol2o3lo2l23opn8l23s2n7l31o8n9o48l19ol2o5n5l22n6o3pl26o5po64l56o4n2l2"
    "n16o2n46lm3om2o5m4l4ol3ol29o2m3o4mn9o7p9o7l29n2pl29n3o32l8sl28m2o4n5p7o9l54o3p7l22o2n8l19o5"
    "n8l18o7p4o12n7o80l73o55l51o13l51o7n6l36m4o8n10o294n31ol42om2po2l2o75m3l29n10lo8l22m11n4p5o22"
    "l18m4p4o38l21n7o20l23o9m3l53m15p7o4n30ml2m2lo9m4l45m11p2op4mo13l25o7n10o6m3l36m14on10p4lm2l"
    "o8l35mp2lo9m3l48m14l4p4m4pm2n10lplp3on20o11l18ol25m12p6ml2mo62l7olol4ol15ol10po6l47m12o5n10"
    "o6m4ol8o2l2o2l22ol7ol2ol5om2lm7o2m2o2m3o2lo6mo5l5m2o2m7o3m5o139l53m18l4p5n10p2opml3o30l48m20"
    "l2plo8n10o166l47m7o2m9p23l4m2o34l48m17p3lo11n10o6p13o19l43m13lpo6n10o54l27o2m15o4n12p3sl7"
    "o185l44m15po100l64n19o12l8o2lo2l8ol2ol24m6om2o2m4lmlm2p3o9n10o70l8o2l39m7o2m7lplmo27lm10l40"
    "m7lm4p8mo8lm11l46m16p3lp5o13l73o7p10o246l9ol37m8om8lp5o10n29o3p2l30o2m22om14o73l7ol2ol38m6o3"
    "mom2om7lmo8n10o6l6ol2ol32m5om2om5lo7n10o310l19m4p2o7m2lml13ol34m7o3m5p13n10o86lo15n21s29o13p"
    "l922o102n111op5o11l196o2636l97p2o13l1072o16ml6m15o4010l583o8633l569o7l31on10o4p2l79on10o6l30"
    "o2m5po10l48m7p5s4l4pso10n10on7ol21o5l19o688l64n23p4o101l75o4mlm55o7m4l13o64l2plmo11m2o14"
    "l6136o8l1238o42l9o8935l4ol7ol2ol291o15lo29l3o2lo14l4o8l396o2308l107o5l13o3l9o7l10o2sm2po4704"
    "m46o2m23o9s116o60s246o10s39o2s60m5s3m6o8m8s2m7s30m4s61o21s66m3so122n20o12n20o12s87o9n25o135"
    "l85ol71ol2o2lo2l2o2l4ol12olol7ol65ol4o2l8ol7ol28ol4ol5olo3l7ol340o2l25sl25sl31sl25sl31sl25s"
    "l31sl25sl31sl25sl8o2n50s512m55s4m50s8ms14ms2p5o15m5om15o1104l31o6l6o213m7om17o2m7om2om5o5l62"
    "o33mo112l45o3m7l7o2n10o4lso320l30mo17l44m4n10o5so464l28m4n10o742l7ol4ol2ol15ol197o2n9m7o41"
    "l68m7lo4n10o4p2o785n59sn3sn4o76n45sn15o194l4ol27ol2olo2lol10ol4ololo6lo4lololol3ol2olo2lolol"
    "ololol2olo2l4ol7ol4ol4olol10ol17o5l3ol5ol17o52s2o270s44o4s100o12s15o2s15os15os37o10n13s161"
    "o56s29o13s44o4s9o7s2o14s6o154s984o4s17o3s13o3s119o4s95o6s12o4so15s12o4s56o8s10o6s40o8s30o2s2"
    "o78s340o12s14o2s13o3s9o7s46os7o8s14o4s9o7s9o7s147os55o37n10o1030l42720o32l4154o6l222o2l5762"
    "o14l7473o15l622o2466l542o1506l4939o5l4192o712016m240o196112"
)
