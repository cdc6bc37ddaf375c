//! What a comparison found, in one line.

use crate::record::{Comparison, Outcome, Row, Timing, bytes, label, scientific, seconds};

impl Comparison {
    /// What was found, in one line; what went wrong comes first.
    pub fn finding(&self) -> String {
        let mut parts = self.faults();
        parts.extend(self.headline());
        if parts.is_empty() {
            parts.push("nothing was timed: every case was refused".to_owned());
        }
        parts.join("; ")
    }

    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        for row in &self.rows {
            let case = row.case();
            match &row.outcome {
                Outcome::Unequal { equality } => faults.push(format!(
                    "{case} is NOT equal to serial (relative error {}, allowed {}) and was not timed",
                    scientific(equality.worst_relative()),
                    scientific(equality.tolerance)
                )),
                Outcome::Error { message } => {
                    let first = message.lines().next().unwrap_or_default();
                    faults.push(format!("{case} FAILED: {first}"));
                }
                Outcome::Timed(measured) if !measured.traffic.equals_formula() => {
                    faults.push(format!("{case} sent other bytes than its formula says"))
                }
                _ => {}
            }
        }
        faults
    }

    /// DSP beside the strategy that sends least of the others, on the most ranks that have a core
    /// each; without such ranks, on the most there are.
    fn headline(&self) -> Option<String> {
        let exact = self
            .timed()
            .map(|(_, measured)| measured.equality.worst_relative())
            .fold(0.0, f64::max);
        let exact = format!("all exact to {}", scientific(exact));
        let serial = self.timed().find(|(row, _)| row.ranks == 1);
        let rank = |ranks| if ranks == 1 { "rank" } else { "ranks" };

        let parallel: Vec<_> = self.timed().filter(|(row, _)| row.ranks > 1).collect();
        let leads = |row: &Row| row.strategy == "dsp";
        let choices: [&dyn Fn(&Row) -> bool; 4] = [
            &|row| leads(row) && !row.oversubscribed,
            &leads,
            &|row| !row.oversubscribed,
            &|_| true,
        ];
        let most = |choice: &dyn Fn(&Row) -> bool| {
            let rows = parallel.iter().map(|(row, _)| row);
            rows.filter(|row| choice(row)).map(|row| row.ranks).max()
        };
        let Some(ranks) = choices.into_iter().find_map(most) else {
            let (row, measured) = serial?;
            return Some(format!(
                "{} takes {}; no strategy was timed on more ranks; {exact}",
                row.case(),
                seconds(measured.time.median_seconds)
            ));
        };
        let mut cases: Vec<_> = parallel
            .into_iter()
            .filter(|(row, _)| row.ranks == ranks)
            .collect();
        cases.sort_by_key(|(row, measured)| {
            // A mixture may be DSP under another name: it comes last.
            let mixture = row.strategy.contains('+');
            let sent = measured.traffic.busiest_rank_bytes();
            (row.strategy != "dsp", mixture, sent)
        });
        let (first, ours) = *cases.first()?;
        let sent = ours.traffic.busiest_rank_bytes();
        let took = ours.time.median_seconds;
        let mut line = match cases.get(1) {
            Some((second, theirs)) => {
                let other = theirs.traffic.busiest_rank_bytes();
                let ratio = if sent == other || sent == 0 || other == 0 {
                    "as much".to_owned()
                } else if other > sent {
                    format!("{:.1}× less", other as f64 / sent as f64)
                } else {
                    format!("{:.1}× more", sent as f64 / other as f64)
                };
                format!(
                    "{} sends {} of activations a rank where {} sends {} ({ratio}), and takes {} against {} on {ranks} {}{}",
                    label(&first.strategy),
                    bytes(sent),
                    label(&second.strategy),
                    bytes(other),
                    seconds(took),
                    seconds(theirs.time.median_seconds),
                    rank(ranks),
                    in_rounds(&ours.time, &theirs.time)
                )
            }
            None => format!(
                "{} sends {} a rank and takes {} on {ranks} {}",
                label(&first.strategy),
                bytes(sent),
                seconds(took),
                rank(ranks)
            ),
        };
        if let Some((row, measured)) = serial {
            line += &format!(
                " (serial on {}: {})",
                row.ranks,
                seconds(measured.time.median_seconds)
            );
        }
        if first.oversubscribed {
            let (number, unit) = match self.machine.gpus {
                Some(gpus) => (gpus, "GPU"),
                None => (self.machine.cores, "core"),
            };
            let plural = if number == 1 { "" } else { "s" };
            line += &format!(
                "; {ranks} ranks share {number} {unit}{plural}, so these times are not speed-ups"
            );
        }
        Some(format!("{line}; {exact}"))
    }
}

/// In how many of the rounds, in which both took turns, the first took less than the second: medians that differ say
/// little where this is about half.
fn in_rounds(first: &Timing, second: &Timing) -> String {
    let both = || first.repeats_seconds.iter().zip(&second.repeats_seconds);
    let less = both().filter(|(first, second)| first < second).count();
    match both().count() {
        1 => ", in one round".to_owned(),
        rounds => format!(", less in {less} of {rounds} rounds"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::sample::{comparison, equality, timed};

    #[test]
    fn the_finding_sets_dsp_beside_ulysses_on_ranks_that_have_a_core_each() {
        assert_eq!(
            comparison(2).finding(),
            "DSP sends 18.9 MB of activations a rank where Ulysses sends 37.7 MB (2.0× less), and takes 5.11 s \
             against 5.62 s on 2 ranks, less in 3 of 3 rounds (serial on 1: 8.12 s); all exact to 3.1e-6"
        );
        assert!(comparison(4).finding().contains("on 4 ranks"));
        let mut with_mixture = comparison(2);
        with_mixture.push("dsp+ulysses", 2, timed(2, 5.0, 18_874_368, 2));
        assert_eq!(with_mixture.finding(), comparison(2).finding());
    }

    #[test]
    fn the_finding_does_not_call_shared_cores_a_speed_up() {
        let finding = comparison(1).finding();
        assert!(
            finding.contains("4 ranks share 1 core, so these times are not speed-ups"),
            "{finding}"
        );
    }

    #[test]
    fn the_finding_says_first_what_went_wrong() {
        let mut comparison = comparison(2);
        assert!(comparison.all_well());
        comparison.push(
            "ring",
            2,
            Outcome::Unequal {
                equality: equality(0.5),
            },
        );
        comparison.push(
            "lss",
            2,
            Outcome::Error {
                message: "rank 1 panicked\nmore".into(),
            },
        );
        let finding = comparison.finding();
        assert!(
            finding.starts_with(
                "Ring on 2 ranks is NOT equal to serial (relative error 5e-1, allowed 2e-5)"
            ),
            "{finding}"
        );
        assert!(
            finding.contains("LSS on 2 ranks FAILED: rank 1 panicked; DSP"),
            "{finding}"
        );
        assert!(!comparison.all_well());
    }

    #[test]
    fn the_finding_names_a_count_that_differs_from_its_formula() {
        let mut comparison = comparison(2);
        let Outcome::Timed(measured) = &mut comparison.rows[3].outcome else {
            panic!("timed");
        };
        measured.traffic.per_rank[1].backward.formula_bytes += 4;
        assert!(
            comparison
                .finding()
                .starts_with("DSP on 2 ranks sent other bytes")
        );
        assert!(!comparison.all_well());
    }

    #[test]
    fn the_finding_copes_with_one_strategy_with_none_and_without_dsp() {
        let mut comparison = comparison(2);
        let rows = std::mem::take(&mut comparison.rows);
        assert_eq!(
            comparison.finding(),
            "nothing was timed: every case was refused"
        );
        comparison.push("serial", 1, timed(1, 8.0, 0, 0));
        assert!(
            comparison
                .finding()
                .starts_with("Serial on 1 rank takes 8.00 s")
        );
        comparison.rows.push(rows[4].clone());
        assert!(
            comparison
                .finding()
                .starts_with("Ulysses sends 37.7 MB a rank and takes 5.62 s")
        );
    }
}
