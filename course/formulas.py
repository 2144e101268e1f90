"""Formulas in LaTeX as MathML, which browsers show without a script or a network.

A module apart, because Sphinx reads it with its settings: what the site's other pages need takes a second to import.
"""

import re

UNSTRETCHED = ' stretchy="false"'


def mathml(latex: str, display: str = "inline") -> str:
    """Write a formula in LaTeX as MathML. `display` is "inline" or "block"."""
    from latex2mathml.converter import convert

    latex = re.sub(r"(\\[bB]igg?[lr]) *\\[lr]vert", r"\1|", latex)  # the converter has \lvert, but not as a delimiter
    latex = re.sub(r"(\\[dt]?binom) *(\d) *(\d)", r"\1{\2}{\3}", latex)  # and reads 84 as one number after \binom
    latex = re.sub(r"(\\math(?:bb|bf|cal|frak|it|rm|scr|sf|tt)) *([A-Za-z])", r"\1{\2}", latex)  # nor E after \mathbb
    bars = r"<mo([^>]*)>(?=(?:&#x02016;|&#x0007C;|\|)</mo>)"  # browsers space them as infix, and stretch one of two

    def without_space(bar: re.Match[str]) -> str:
        attributes = bar[1] or UNSTRETCHED
        return f'<mo lspace="0" rspace="0"{attributes}>'

    return re.sub(bars, without_space, convert(latex, display=display))
