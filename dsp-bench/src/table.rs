//! A comparison as text: 120 columns at most, readable without colour.

use std::fmt::Write;

use comfy_table::{
    Cell, CellAlignment, ColumnConstraint, ContentArrangement, ContentLineStyle, LineStyle, Table,
    TableStyle, Width,
};

use crate::record::{
    CollectiveCount, Comparison, Difference, Measured, Outcome, Row, bytes, label, scientific,
};

/// The widest line.
const COLUMNS: u16 = 120;

/// Lines above and below the header and at the end, and space between columns.
const STYLE: TableStyle = TableStyle::new()
    .top_border(LineStyle::new('─', '─', '─', '─'))
    .header_lines(ContentLineStyle::none())
    .header_separator(LineStyle::new('─', '─', '─', '─'))
    .content_lines(ContentLineStyle::none())
    .bottom_border(LineStyle::new('─', '─', '─', '─'));

/// The tables of a comparison (equality, then cost), with their footnotes; ends with a line break.
/// Without the finding, which is the caller's last line.
pub fn render(comparison: &Comparison) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{}\n", heading(comparison));
    let _ = writeln!(
        text,
        "Equality with serial on one rank: max |Δ|, and beside it relative to max(max |serial|, 1e-3); allowed {}",
        scientific(comparison.scenario.tolerance)
    );
    let _ = writeln!(text, "{}\n", equality_table(comparison).trim_fmt());
    let _ = writeln!(
        text,
        "Cost of one {} pass",
        comparison.scenario.passes.label()
    );
    let _ = writeln!(text, "{}", cost_table(comparison).trim_fmt());
    for note in footnotes(comparison) {
        let _ = writeln!(text, "{note}");
    }
    text
}

/// What was compared and where, in two lines.
fn heading(comparison: &Comparison) -> String {
    let scenario = &comparison.scenario;
    let model = scenario.model.sizes().describe(scenario.batch);
    let machine = &comparison.machine;
    let cores = if machine.cores == 1 { "core" } else { "cores" };
    let memory = machine
        .memory_bytes
        .map_or(String::new(), |m| format!(", {}", bytes(m)));
    wrap(&format!(
        "{}: {}; batch {}, {}, {}, {}",
        scenario.name,
        model.model,
        scenario.batch,
        model.tokens,
        scenario.dtype.label(),
        scenario.passes.label()
    )) + "\n"
        + &wrap(&format!(
            "{} {cores}{memory}, {}, backend {}{}",
            machine.cores,
            machine.cpu.as_deref().unwrap_or("processor unknown"),
            comparison.backend,
            scenario
                .threads_per_rank
                .map_or(String::new(), |threads| format!(", {threads} to a rank"))
        ))
}

fn equality_table(comparison: &Comparison) -> Table {
    let mut table = empty([
        "strategy",
        "ranks",
        "output",
        "input gradient",
        "parameter gradients",
        "",
    ]);
    align_right(&mut table, &[1, 2, 3, 4]);
    for row in &comparison.rows {
        let (equality, verdict) = match &row.outcome {
            Outcome::Timed(measured) => (&measured.equality, "equal"),
            Outcome::Unequal { equality } => (equality, "NOT EQUAL, not timed"),
            Outcome::Refused { .. } | Outcome::Error { .. } => continue,
        };
        let mut cells = named(row);
        cells.push(Cell::new(difference(Some(&equality.output))));
        cells.push(Cell::new(difference(equality.input_gradient.as_ref())));
        cells.push(Cell::new(difference(equality.parameter_gradients.as_ref())));
        cells.push(Cell::new(verdict));
        table.add_row(cells);
    }
    table
}

/// Every rank's ledger: what it sent in the last run, and whether that equals the formula.
pub fn ledgers(comparison: &Comparison) -> String {
    let mut table = empty([
        "strategy",
        "ranks",
        "rank",
        "forward",
        "backward",
        "parameters",
        "equals\nformula",
    ]);
    align_right(&mut table, &[1, 2, 3, 4, 5]);
    for row in &comparison.rows {
        let Outcome::Timed(measured) = &row.outcome else {
            continue;
        };
        for (rank, traffic) in measured.traffic.per_rank.iter().enumerate() {
            let sent = [traffic.forward, traffic.backward, traffic.parameters];
            let equal = sent
                .iter()
                .all(|sent| sent.measured_bytes == sent.formula_bytes);
            let mut cells = named(row);
            cells.push(Cell::new(rank));
            cells.extend(sent.map(|sent| Cell::new(sent.measured_bytes)));
            cells.push(Cell::new(if equal { "yes" } else { "NO" }));
            table.add_row(cells);
        }
    }
    format!("What each rank sent, in bytes\n{}", table.trim_fmt())
}

fn cost_table(comparison: &Comparison) -> Table {
    let unit = Unit::of(comparison);
    let mut headers = vec![
        "strategy".to_owned(),
        "ranks".to_owned(),
        format!("time,\n{}", unit.name()),
        "\nmin–max".to_owned(),
        "of it\ncompute".to_owned(),
        "\ncomm.".to_owned(),
        "\nwait".to_owned(),
        "sent by\na rank".to_owned(),
        "beside:\ngradients".to_owned(),
        "equals\nformula".to_owned(),
        "peak\nmemory".to_owned(),
        "collectives".to_owned(),
    ];
    let hides = hides(comparison);
    if hides {
        headers.insert(HIDDEN, "hidden\ncomm.".to_owned());
    }
    let last = headers.len() - 1;
    let mut table = empty(headers);
    align_right(
        &mut table,
        &[1, 2, 3, 4, 5, 6, HIDDEN, last - 4, last - 3, last - 1],
    );
    if let Some(column) = table.column_mut(last) {
        column.set_padding((0, 0));
    }
    // Names of strategies and of collectives are not broken.
    for (column, width) in [(0, 12), (last, 17)] {
        if let Some(column) = table.column_mut(column) {
            column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(width)));
        }
    }
    for row in &comparison.rows {
        let mut cells = named(row);
        match &row.outcome {
            Outcome::Timed(measured) => cells.extend(cost(row, measured, unit)),
            Outcome::Unequal { .. } => cells.extend(no_cost("NOT EQUAL")),
            Outcome::Refused { .. } => cells.extend(no_cost("refused")),
            Outcome::Error { .. } => cells.extend(no_cost("FAILED")),
        }
        if hides {
            cells.insert(HIDDEN, hidden(row, unit));
        }
        table.add_row(cells);
    }
    table
}

/// Where the column of hidden communication stands.
const HIDDEN: usize = 7;

/// Whether anything was moved while a rank computed: only engines with threads of their own do that.
fn hides(comparison: &Comparison) -> bool {
    let mut timed = comparison.timed();
    timed.any(|(_, measured)| measured.time.mean().hidden_seconds > 0.0)
}

fn hidden(row: &Row, unit: Unit) -> Cell {
    match &row.outcome {
        Outcome::Timed(measured) => Cell::new(unit.show(measured.time.mean().hidden_seconds)),
        _ => Cell::new("–"),
    }
}

fn cost(row: &Row, measured: &Measured, unit: Unit) -> Vec<Cell> {
    let time = &measured.time;
    let mean = time.mean();
    let shared = if row.oversubscribed { "*" } else { "" };
    let equal = measured.traffic.equals_formula();
    [
        unit.show(time.median_seconds) + shared,
        format!(
            "{}–{}",
            unit.round(time.min_seconds),
            unit.round(time.max_seconds)
        ),
        unit.show(mean.compute_seconds),
        unit.show(mean.communication_seconds),
        unit.show(mean.waiting_seconds),
        bytes(measured.traffic.busiest_rank_bytes()),
        bytes(measured.traffic.gradients_bytes()),
        if equal { "yes" } else { "NO" }.to_owned(),
        bytes(measured.memory.peak_bytes),
        collectives(&measured.traffic.collectives),
    ]
    .map(Cell::new_owned)
    .to_vec()
}

/// A row without numbers says why in the last column, which has the room.
fn no_cost(why: &str) -> Vec<Cell> {
    let mut cells = vec![Cell::new("–"); 9];
    cells.push(Cell::new(why));
    cells
}

/// One unit for all times of a table, so that they can be compared at a glance.
#[derive(Debug, Clone, Copy)]
enum Unit {
    Seconds,
    Milliseconds,
}

impl Unit {
    fn of(comparison: &Comparison) -> Self {
        let slow = comparison
            .timed()
            .any(|(_, measured)| measured.time.median_seconds >= 1.0);
        if slow {
            Self::Seconds
        } else {
            Self::Milliseconds
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Seconds => "s",
            Self::Milliseconds => "ms",
        }
    }

    /// Of a range, where there is little room.
    fn round(self, seconds: f64) -> String {
        match self {
            Self::Milliseconds if seconds >= 0.00995 => format!("{:.0}", seconds * 1e3),
            _ => self.show(seconds),
        }
    }

    fn show(self, seconds: f64) -> String {
        match self {
            Self::Seconds => format!("{seconds:.2}"),
            Self::Milliseconds if seconds >= 0.09995 => format!("{:.0}", seconds * 1e3),
            Self::Milliseconds => format!("{:.1}", seconds * 1e3),
        }
    }
}

fn footnotes(comparison: &Comparison) -> Vec<String> {
    let time = match comparison.rounds() {
        0 | 1 => "one run each, so that small differences mean nothing".to_owned(),
        rounds => format!("the median of {rounds} rounds, in which the cases took turns"),
    };
    let memory = match comparison.machine.gpus {
        Some(_) => "of the host, not of a GPU",
        None => "as Rust code allocates it",
    };
    let mut notes = vec![format!(
        "Time: wall clock, {time}; compute, communication and waiting are means of its ranks. \
         Sent: activations, and their gradients backward. Beside: the parameters' gradients, to sum them; of those that a \
         strategy shards, none are sent. Both by the rank that sends most. Memory: all ranks together, {memory}."
    )];
    if hides(comparison) {
        let note = "Hidden communication: data on their way while the rank computed. What is under comm. is the rest of it, \
                    exposed.";
        notes.push(note.to_owned());
    }
    if let Some(shared) = comparison.shared() {
        notes.push(format!(
            "* There are {shared}: ranks share them, and such times are not speed-ups."
        ));
    }
    for row in &comparison.rows {
        let note = match &row.outcome {
            Outcome::Refused { reason } => format!("{} refused: {reason}", row.case()),
            Outcome::Error { message } => format!("{} FAILED: {message}", row.case()),
            Outcome::Unequal { equality } => {
                let worst: Vec<String> = equality
                    .parts()
                    .filter(|(_, d)| d.relative.is_nan() || d.relative > equality.tolerance)
                    .map(|(part, d)| {
                        format!("{part} by {} in {}", scientific(d.relative), d.tensor)
                    })
                    .collect();
                format!(
                    "{} is NOT equal to serial: {}",
                    row.case(),
                    worst.join(", ")
                )
            }
            Outcome::Timed(measured) if !measured.traffic.equals_formula() => {
                let ranks: Vec<String> = measured
                    .traffic
                    .per_rank
                    .iter()
                    .enumerate()
                    .flat_map(|(rank, sent)| {
                        [
                            ("forward", sent.forward),
                            ("backward", sent.backward),
                            ("parameters", sent.parameters),
                        ]
                        .map(|(pass, sent)| (rank, pass, sent))
                    })
                    .filter(|(_, _, sent)| sent.measured_bytes != sent.formula_bytes)
                    .map(|(rank, pass, sent)| {
                        format!(
                            "rank {rank} {pass} {} bytes, formula {}",
                            sent.measured_bytes, sent.formula_bytes
                        )
                    })
                    .collect();
                format!(
                    "{}: bytes differ from the formula: {}",
                    row.case(),
                    ranks.join("; ")
                )
            }
            Outcome::Timed(_) => continue,
        };
        notes.push(note);
    }
    notes.iter().map(|note| wrap(note)).collect()
}

/// `4 all-to-all` and `1 all-reduce`, a line each, forward and backward together; `none`.
fn collectives(counts: &[CollectiveCount]) -> String {
    if counts.is_empty() {
        return "none".to_owned();
    }
    let each: Vec<String> = counts
        .iter()
        .map(|count| format!("{} {}", count.forward + count.backward, count.kind))
        .collect();
    each.join("\n")
}

fn difference(difference: Option<&Difference>) -> String {
    difference.map_or("–".to_owned(), |d| {
        format!("{} ({})", scientific(d.max_abs), scientific(d.relative))
    })
}

/// A table of the program's style, with its header.
pub(crate) fn empty(header: impl IntoIterator<Item = impl Into<Cell>>) -> Table {
    let mut table = Table::new();
    table
        .load_style(STYLE)
        .force_no_tty()
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_width(COLUMNS)
        .set_header(header.into_iter().map(Into::into).collect::<Vec<Cell>>());
    for column in table.column_iter_mut() {
        column.set_padding((0, 1));
    }
    table
}

fn align_right(table: &mut Table, columns: &[usize]) {
    for &column in columns {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

fn named(row: &Row) -> Vec<Cell> {
    vec![Cell::new(label(&row.strategy)), Cell::new(row.ranks)]
}

/// Breaks at spaces after at most [`COLUMNS`] characters; later lines are indented.
fn wrap(text: &str) -> String {
    let mut wrapped = String::new();
    let mut column = 0;
    for word in text.split_whitespace() {
        let length = word.chars().count();
        if column > 0 && column + 1 + length > usize::from(COLUMNS) {
            wrapped.push_str("\n  ");
            column = 2;
        } else if column > 0 {
            wrapped.push(' ');
            column += 1;
        }
        wrapped.push_str(word);
        column += length;
    }
    wrapped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::sample;

    fn everything() -> Comparison {
        let mut comparison = sample::comparison(2);
        comparison.push(
            "ring",
            2,
            Outcome::Unequal {
                equality: sample::equality(0.5),
            },
        );
        comparison.push(
            "usp",
            3,
            Outcome::Refused {
                reason: "3 ranks are no mesh of 2×2; choose 4, or write a mesh of 3×1 ".repeat(3),
            },
        );
        comparison.push(
            "lss",
            4,
            Outcome::Error {
                message: "rank 1 panicked".into(),
            },
        );
        comparison
    }

    #[test]
    fn no_line_is_wider_than_120_columns() {
        let text = render(&everything());
        for line in text.lines() {
            assert!(line.chars().count() <= usize::from(COLUMNS), "{line}");
        }
    }

    #[test]
    fn every_case_stands_there_with_its_numbers_or_its_reason() {
        let text = render(&everything());
        // However wide its columns are.
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        for expected in [
            "5.11 4.96–5.31",
            "5.43* ",
            "18.9 MB 7.0 MB yes",
            "14.2 MB 21.0 MB yes",
            "4 all-to-all",
            "NOT EQUAL, not timed",
            "USP on 3 ranks refused: 3 ranks are no mesh",
            "LSS on 4 ranks FAILED: rank 1 panicked",
            "* There are more compute threads than cores (2): ranks share them, and such times are not speed-ups.",
            "hidden 1152, 16 heads",
        ] {
            assert!(text.contains(expected), "no {expected:?} in\n{text}");
        }
    }

    #[test]
    fn hidden_communication_has_a_column_where_there_is_some() {
        let mut comparison = sample::comparison(4);
        let note = "Hidden communication: data on their way";
        assert!(!render(&comparison).contains(note));
        let Outcome::Timed(measured) = &mut comparison.rows[3].outcome else {
            panic!("timed");
        };
        for rank in &mut measured.time.per_rank {
            rank.hidden_seconds = 0.77;
        }
        let text = render(&comparison);
        assert!(text.contains(note) && text.contains(" 0.77 "), "{text}");
    }

    #[test]
    fn a_count_that_differs_from_its_formula_is_told_to_the_byte() {
        let mut comparison = sample::comparison(4);
        let Outcome::Timed(measured) = &mut comparison.rows[3].outcome else {
            panic!("timed");
        };
        measured.traffic.per_rank[1].backward.formula_bytes += 4;
        let text = render(&comparison);
        assert!(
            text.contains("rank 1 backward 9437184 bytes, formula 9437188"),
            "{text}"
        );
        assert!(
            !text.contains("not speed-ups"),
            "4 ranks have 4 cores\n{text}"
        );
    }
}
