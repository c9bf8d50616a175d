//! Cells of a table, padded to the width of their columns.
//!
//! Owns the alignment. Does not know what is in the cells, or what is between them.

/// Returns the cells of each line, padded with spaces so that each column is as wide as its widest cell.
pub fn padded<const N: usize>(lines: &[[String; N]]) -> Vec<Vec<String>> {
    let widths: Vec<usize> = (0..N)
        .map(|column| lines.iter().map(|cells| cells[column].chars().count()).max().unwrap_or(0))
        .collect();
    let pad = |cells: &[String; N]| {
        cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect()
    };
    lines.iter().map(pad).collect()
}
