//! Colours, patterns and text of the picture.
//!
//! Owns which colour a pool has, and how text is escaped. Does not know what is drawn.

use std::fmt::Write as _;

/// Okabe and Ito: colours that people with any kind of colour blindness can tell apart. Without the yellow, which is too
/// light on white, and the black.
const COLOURS: [&str; 6] = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9"];

/// What is drawn over a colour, so that pools differ without colours, too.
const PATTERNS: [&str; 5] = [
    "",
    "M0 8L8 0M-2 2L2 -2M6 10L10 6",
    "M0 2H8M0 6H8",
    "M2 2h2v2h-2zM6 6h2v2h-2z",
    "M0 0L8 8M-2 6L2 10M6 -2L10 2",
];

/// The style of the picture, for light and dark windows. Programs that do not know media queries draw the light one.
pub(super) const STYLE: &str = "
svg{max-width:100%;height:auto}
text{font:11px ui-monospace,'DejaVu Sans Mono',Menlo,Consolas,monospace;fill:#1a1a1a}
.heading{font-size:15px;font-weight:bold}
.number{font-weight:bold;font-size:12px}
.right,.flag{text-anchor:end}
.name,.note,.flag{fill:#555}
.page{fill:#fff}
.frame{fill:none;stroke:#999}
.socket>.frame{fill:#f4f4f4;stroke:#777}
.node>.frame{fill:#fff;stroke:#aaa}
.core>.frame{fill:none;stroke:#bbb}
.outline{fill:none;stroke:#666}
.none .outline,.offline .outline{stroke-dasharray:4 3}
.swatch{stroke:#666}
.tint{opacity:0}
.taken .tint{opacity:.22}
.offline text,.none text{fill:#777}
@media (prefers-color-scheme:dark){
svg{background:#161616}
text{fill:#eee}
.name,.note,.flag{fill:#b5b5b5}
.page{fill:#161616}
.socket>.frame{fill:#202020;stroke:#888}
.node>.frame{fill:#161616;stroke:#666}
.core>.frame{stroke:#555}
.outline,.swatch{stroke:#999}
.taken .tint{opacity:.35}
.offline text,.none text{fill:#999}
}
";

/// The colours and patterns of pools.
pub(super) struct Swatches {
    /// In the order of their names, as they are shown.
    pools: Vec<String>,
}

impl Swatches {
    pub(super) fn new<'a>(pools: impl Iterator<Item = &'a String>) -> Self {
        Self { pools: pools.map(|name| super::shown(name)).collect() }
    }

    fn number(&self, pool: &str) -> usize {
        self.pools.iter().position(|name| name == pool).unwrap_or(0)
    }

    /// Returns the colour of a pool.
    pub(super) fn colour(&self, pool: &str) -> &'static str {
        colour(self.number(pool))
    }

    /// Returns the colour with the pattern of a pool, as the value of an attribute.
    pub(super) fn fill(&self, pool: &str) -> String {
        format!("url(#pool-{})", self.number(pool))
    }

    /// Returns the definitions of all patterns.
    pub(super) fn definitions(&self) -> String {
        let mut text = String::new();
        for number in 0..self.pools.len() {
            let colour = colour(number);
            let pattern = PATTERNS.iter().cycle().nth(number % PATTERNS.len()).unwrap_or(&"");
            let _ = writeln!(
                text,
                "<pattern id=\"pool-{number}\" width=\"8\" height=\"8\" patternUnits=\"userSpaceOnUse\"><rect width=\"8\" \
                 height=\"8\" fill=\"{colour}\"/><path d=\"{pattern}\" stroke=\"#fff\" stroke-width=\"1.5\" \
                 fill=\"none\"/></pattern>"
            );
        }
        text
    }
}

/// Returns the colour with this number.
fn colour(number: usize) -> &'static str {
    COLOURS.get(number % COLOURS.len()).copied().unwrap_or("#777777")
}

/// Returns text for an element or an attribute of XML. Characters that XML does not allow become U+FFFD; names are made
/// visible before ([`kcm_mount::text`]), so that they have none.
pub(super) fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\0'..=' ' | '\u{7f}'..='\u{9f}' | '\u{fffe}' | '\u{ffff}' if c != ' ' => {
                escaped.push('\u{fffd}')
            }
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_become_markup() {
        assert_eq!(escaped("a<b>&\"c' d"), "a&lt;b&gt;&amp;&quot;c&#39; d");
        assert_eq!(escaped("\0\x1b\u{9b}\u{fffe}é日"), "\u{fffd}\u{fffd}\u{fffd}\u{fffd}é日");
    }

    #[test]
    fn thirty_pools_differ_in_colour_or_pattern() {
        let names: Vec<String> = (0..30).map(|number| format!("p{number:02}")).collect();
        let swatches = Swatches::new(names.iter());
        let definitions = swatches.definitions();
        let looks: std::collections::BTreeSet<&str> =
            definitions.lines().map(|line| line.split_once("fill=").unwrap().1).collect();
        assert_eq!(looks.len(), 30);
        assert!(definitions.contains(&format!("id=\"{}\"", &swatches.fill("p29")[5..12])));
    }
}
