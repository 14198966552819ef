"""Texts for a look at tokenizers: English prose, code, arithmetic, and one sentence in many languages and scripts."""

from __future__ import annotations

from pathlib import Path

from scripts.studies.tasks.additions import problems


ROOT = Path(__file__).parents[3]


# Universal Declaration of Human Rights, article 1, first sentence (United Nations, public domain)
LANGUAGES = """All human beings are born free and equal in dignity and rights.
Alle Menschen sind frei und gleich an Würde und Rechten geboren.
Tous les êtres humains naissent libres et égaux en dignité et en droits.
Todos los seres humanos nacen libres e iguales en dignidad y derechos.
Todos os seres humanos nascem livres e iguais em dignidade e em direitos.
Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti.
Alle mensen worden vrij en gelijk in waardigheid en rechten geboren.
Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw.
Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv.
Minden emberi lény szabadon születik és egyenlő méltósága és joga van.
Tüm insanlar hür, haysiyet ve haklar bakımından eşit doğarlar.
Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền.
Semua orang dilahirkan merdeka dan mempunyai martabat dan hak-hak yang sama.
Все люди рождаются свободными и равными в своем достоинстве и правах.
Всі люди народжуються вільними і рівними у своїй гідності та правах.
Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.
يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.
כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.
तमाम मनुष्य जन्म से स्वतन्त्र तथा गरिमा और अधिकारों में समान हैं।
มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ
人人生而自由，在尊严和权利上一律平等。
すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。
모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.
"""


def texts() -> dict[str, list[str]]:
    """Pieces of text by kind, each some hundred tokens at most."""
    code = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "trl_distill" / "objective").glob("[d-t]*.py"))]
    return {
        "prose": _pieces((ROOT / "LICENSE").read_text(encoding="utf-8"), 1500)[:6],
        "code": _pieces("\n".join(code), 1500)[:6],
        "arithmetic": list(problems(40, seed=9)["solution"]),
        "languages": LANGUAGES.splitlines(),
    }


def _pieces(text: str, size: int) -> list[str]:
    """A text in pieces of whole lines, of at least `size` characters."""
    found, piece = [], ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= size:
            found.append(piece)
            piece = ""
    return found
