"""How a report looks: one style sheet, light and dark by the reader's choice, black on white on paper."""

from __future__ import annotations

STYLE = """
:root {
  --ink: #1c1e21; --soft: #5d646d; --line: #dfe2e6; --page: #fff; --card: #f6f7f8; --s0: #2f6fb3; --s1: #d0772b
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --ink: #e7e9ec; --soft: #9aa3ad; --line: #343a41; --page: #15181b; --card: #1e2226; --s0: #6ea8e0; --s1: #eb9c58
  }
}
* { box-sizing: border-box }
html { font: 16px/1.55 system-ui, "Segoe UI", "Helvetica Neue", "DejaVu Sans", sans-serif }
body { margin: 0 auto; max-width: 60rem; padding: 3rem 1.5rem; color: var(--ink); background: var(--page) }
h1, h2 { line-height: 1.2; letter-spacing: -.01em; text-wrap: balance }
h1 { font-size: 2.4rem; margin: 0 0 .5rem }
h2 { font-size: 1.3rem; margin: 0 0 .5rem }
p { max-width: 44rem; margin: 0 0 1rem; text-wrap: pretty }
header p, section > p, footer, figcaption, small { color: var(--soft) }
.kind { text-transform: uppercase; letter-spacing: .09em; font-size: .78rem; margin: 0 0 .4rem }
section { margin-top: 2.5rem; padding-top: 1.5rem; border-top: 1px solid var(--line) }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.3rem, 1fr)); gap: .75rem; margin: 2rem 0 0 }
.figures div { background: var(--card); border-radius: .5rem; padding: .8rem 1rem }
.figures dt { color: var(--soft); font-size: .85rem }
.figures dd { margin: .1rem 0 0; font-size: 1.45rem; font-weight: 600; font-variant-numeric: tabular-nums }
.figures small { display: block; font-size: .8rem; font-weight: 400 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 500 }
.strips th { color: var(--soft); font-size: .85rem; padding: 0 1rem 0 0; white-space: nowrap; width: 5.5rem }
.strips td { padding: 2px 0 }
.strips img { display: block; image-rendering: pixelated; max-width: 100%; height: auto }
.numbers { font-size: .88rem; margin: 0 0 1.25rem }
.numbers td, .numbers th { padding: .3rem 0 .3rem 1.4rem; border-bottom: 1px solid var(--line); text-align: right }
.numbers td { white-space: nowrap }
.numbers th:first-child { padding-left: 0; text-align: left }
.numbers thead th { color: var(--soft); vertical-align: bottom }
.facts { font-size: .88rem }
.facts th { color: var(--soft); padding: .15rem 1.5rem .15rem 0; vertical-align: top; white-space: nowrap }
.facts td { overflow-wrap: anywhere }
figure { margin: 0 }
.plot { max-width: 36rem; margin: .5rem 0 1rem }
.maps { display: flex; flex-wrap: wrap; gap: 1.5rem }
.maps img { display: block; image-rendering: pixelated; border: 1px solid var(--line) }
figcaption { font-size: .85rem; margin-top: .4rem; line-height: 1.35 }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, "DejaVu Sans", sans-serif; fill: var(--ink) }
svg .fill.s0 { fill: var(--s0); fill-opacity: .75 } svg .fill.s1 { fill: var(--s1); fill-opacity: .6 }
svg .dots.s0 { fill: var(--s0) } svg .dots.s1 { fill: var(--s1) }
svg .frame { stroke: var(--soft); fill: none } svg .grid { stroke: var(--line); fill: none }
svg .rule { stroke: var(--soft); stroke-dasharray: 4 4; fill: none }
svg .below { text-anchor: middle } svg .name { text-anchor: end } svg .label { fill: var(--soft) }
pre { background: var(--card); border-radius: .5rem; padding: .8rem 1rem; font-size: .88rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere }
footer { margin-top: 3rem; font-size: .85rem }
@media print {
  html { font-size: 10.5pt } body { max-width: none; padding: 0 }
  section { break-inside: avoid; margin-top: 1.2rem; padding-top: .8rem } .plot { max-width: 26rem }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact }
}
"""
