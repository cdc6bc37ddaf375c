//! The invariants of the workspace, which are mostly things that are absent:
//!
//! - arrows point one way: dsp-bench → dsp-models, dsp-strategies → dsp-core;
//! - nothing depends on dsp-bench or xtask, and xtask depends on none of the others;
//! - dsp-core knows neither command line, tables, charts, video files nor TOML, and an asynchronous runtime only by a feature;
//! - dsp-models knows no strategy: neither by a dependency, nor by a feature, nor by name.
//!
//! Dependencies are read as the manifests declare them, which covers every feature and platform
//! without a download. Dev-dependencies are free, except on dsp-bench and xtask: the models'
//! tests run strategies.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::command::metadata;

/// Every crate of the workspace, and the others of it on which it may depend. A crate stands below
/// those that it knows, so that a circle cannot be written down.
const LAYERS: [(&str, &[&str]); 5] = [
    ("dsp-core", &[]),
    ("dsp-strategies", &["dsp-core"]),
    ("dsp-models", &["dsp-core"]),
    ("dsp-bench", &["dsp-core", "dsp-strategies", "dsp-models"]),
    ("xtask", &[]),
];

/// Programs: no crate depends on one, its tests included.
const PROGRAMS: [&str; 2] = ["dsp-bench", "xtask"];

/// What dsp-core does not depend on directly, as it belongs to the program `dsp`.
const NOT_IN_CORE: [&str; 8] = [
    "charts-rs",
    "clap",
    "comfy-table",
    "indicatif",
    "minijinja",
    "tabled",
    "toml",
    "y4m",
];

/// Asynchronous runtimes, which dsp-core has only where a feature's library needs one: its ranks are threads.
const RUNTIMES: [&str; 3] = ["async-std", "smol", "tokio"];

/// Features of dsp-strategies that are not strategies: the default, and Burn's backends.
pub(crate) const NOT_STRATEGIES: [&str; 8] = [
    "default", "all", "flex", "cuda", "wgpu", "vulkan", "mpi", "nccl",
];

/// Where `dsp` is not the strategy: the program's commands (and the crates' names, see [`LAYERS`]).
const COMMANDS: [&str; 2] = ["dsp compare", "dsp verify"];

/// One crate of the workspace, as its manifest declares it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Package {
    name: String,
    folder: PathBuf,
    features: Vec<String>,
    dependencies: Vec<Dependency>,
}

/// An edge from one crate to another.
#[derive(Clone, Debug, PartialEq)]
struct Dependency {
    name: String,
    /// Only tests, examples and benches see it.
    dev: bool,
    /// Only with a feature.
    optional: bool,
}

impl Package {
    /// The package called `name`.
    pub(crate) fn find<'a>(packages: &'a [Self], name: &str) -> Result<&'a Self> {
        let found = packages.iter().find(|package| package.name == name);
        found.with_context(|| format!("the workspace has no crate `{name}`"))
    }

    /// The strategies among this crate's features.
    pub(crate) fn strategies(&self) -> Vec<String> {
        let strategy = |feature: &&String| !NOT_STRATEGIES.contains(&feature.as_str());
        self.features.iter().filter(strategy).cloned().collect()
    }

    fn from_json(json: &Value) -> Option<Self> {
        let dependency = |json: &Value| {
            Some(Dependency {
                name: json["name"].as_str()?.to_owned(),
                dev: json["kind"] == "dev",
                optional: json["optional"] == true,
            })
        };
        Some(Self {
            name: json["name"].as_str()?.to_owned(),
            folder: Path::new(json["manifest_path"].as_str()?)
                .parent()?
                .to_path_buf(),
            features: json["features"].as_object()?.keys().cloned().collect(),
            dependencies: json["dependencies"]
                .as_array()?
                .iter()
                .map(dependency)
                .collect::<Option<_>>()?,
        })
    }
}

/// The workspace's crates.
pub(crate) fn packages() -> Result<Vec<Package>> {
    packages_of(&metadata()?)
}

fn packages_of(metadata: &Value) -> Result<Vec<Package>> {
    let packages = metadata["packages"].as_array();
    packages
        .and_then(|packages| packages.iter().map(Package::from_json).collect())
        .context("cargo's metadata does not have the form expected here")
}

/// Checks every rule, and names all edges and lines that break one.
pub(crate) fn check() -> Result<()> {
    let packages = packages()?;
    let strategies = Package::find(&packages, "dsp-strategies")?.strategies();
    let models = Package::find(&packages, "dsp-models")?;
    let mut broken = broken_edges(&packages);
    broken.extend(strategy_features(models, &strategies));
    let sources = rust_files(&models.folder.join("src"))?;
    for file in &sources {
        let text =
            fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
        let shown = file.strip_prefix(&models.folder).unwrap_or(file);
        for (line, name) in strategy_names(&text, &strategies) {
            broken.push(format!(
                "dsp-models/{}:{line} names the strategy `{name}`; a model knows only the trait \
                 SequenceParallel: let the caller choose (a comment on a line of its own may name one)",
                shown.display()
            ));
        }
    }
    if !broken.is_empty() {
        bail!("the architecture is broken:\n  {}", broken.join("\n  "));
    }
    let edges: usize = packages
        .iter()
        .map(|package| package.dependencies.len())
        .sum();
    println!(
        "{} crates, {edges} dependencies and {} source files of dsp-models keep the rules; strategies: {}",
        packages.len(),
        sources.len(),
        strategies.join(", ")
    );
    Ok(())
}

/// The edges that break a rule, each with the rule.
fn broken_edges(packages: &[Package]) -> Vec<String> {
    let mut broken = Vec::new();
    for package in packages {
        let Some((name, below)) = LAYERS.iter().find(|(name, _)| *name == package.name) else {
            broken.push(format!(
                "the crate `{}` has no place yet: say in LAYERS of xtask/src/architecture.rs on which it may depend",
                package.name
            ));
            continue;
        };
        for edge in &package.dependencies {
            let Dependency { name: to, .. } = edge;
            let ours = packages.iter().any(|package| package.name == *to);
            let rule = if PROGRAMS.contains(&to.as_str()) {
                "nothing depends on a program"
            } else if edge.dev {
                continue;
            } else if *name == "dsp-models" && to == "dsp-strategies" {
                "a model knows the trait SequenceParallel, never a strategy; in tests it may, as a dev-dependency"
            } else if ours && !below.contains(&to.as_str()) {
                "arrows point one way: dsp-bench -> dsp-models, dsp-strategies -> dsp-core"
            } else if *name == "dsp-core" && NOT_IN_CORE.contains(&to.as_str()) {
                "dsp-core knows neither command line, tables, charts, video files nor TOML; they belong in dsp-bench"
            } else if *name == "dsp-core" && RUNTIMES.contains(&to.as_str()) && !edge.optional {
                "dsp-core has an asynchronous runtime only where a feature needs one: its ranks are threads"
            } else {
                continue;
            };
            broken.push(format!("{name} -> {to}: {rule}"));
        }
    }
    broken
}

/// The features of dsp-models that are called like a strategy.
fn strategy_features(models: &Package, strategies: &[String]) -> Vec<String> {
    let named = models
        .features
        .iter()
        .filter(|feature| strategies.contains(feature));
    let message = |feature| {
        format!(
            "dsp-models has the feature `{feature}`: strategies are features of dsp-strategies and dsp-bench only"
        )
    };
    named.map(message).collect()
}

/// Every `.rs` file under `folder`, in the order of their paths.
fn rust_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in
            fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))?
        {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// The strategies that `source` names, each with its line, counted from one.
///
/// Strings count, and so do parts of identifiers (`use_ulysses`, `DspPlan`), in any case. Lines that
/// are wholly a comment do not: documentation may say what a model runs under.
fn strategy_names(source: &str, strategies: &[String]) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (index, line) in source.lines().enumerate() {
        if line.trim_start().starts_with("//") {
            continue;
        }
        for word in words(line) {
            if strategies.contains(&word) {
                found.push((index + 1, word));
            }
        }
    }
    found
}

/// The words of a line in lower case, identifiers taken apart, [`COMMANDS`] and crates left out.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut rest = line;
    while let Some(start) = rest.find(|letter: char| letter.is_ascii_alphanumeric()) {
        rest = &rest[start..];
        if let Some(length) = not_a_strategy(rest) {
            rest = &rest[length..];
            continue;
        }
        let end = rest
            .find(|letter: char| !identifier(letter))
            .unwrap_or(rest.len());
        words.extend(rest[..end].split('_').flat_map(humps));
        rest = &rest[end..];
    }
    words
}

/// The length of the crate's name or the command with which `text` begins, if it does.
fn not_a_strategy(text: &str) -> Option<usize> {
    let names = LAYERS.iter().map(|(name, _)| *name).chain(COMMANDS);
    for name in names {
        let (head, tail) = text.split_at_checked(name.len()).unwrap_or((text, ""));
        if head.replace('_', "-") == name && !tail.starts_with(identifier) {
            return Some(name.len());
        }
    }
    None
}

/// Whether `letter` may stand in an identifier.
fn identifier(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || letter == '_'
}

/// The words of a name in camel case, in lower case: `DSPPlan` gives `dsp` and `plan`.
fn humps(name: &str) -> Vec<String> {
    let letters: Vec<char> = name.chars().collect();
    let mut words = vec![String::new()];
    for (index, letter) in letters.iter().enumerate() {
        let after_lower = index > 0 && !letters[index - 1].is_ascii_uppercase();
        let before_lower =
            index > 0 && letters.get(index + 1).is_some_and(char::is_ascii_lowercase);
        if letter.is_ascii_uppercase() && (after_lower || before_lower) {
            words.push(String::new());
        }
        if let Some(word) = words.last_mut() {
            word.push(letter.to_ascii_lowercase());
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A workspace with these edges; before a name, `dev` makes it a dev-dependency, `optional` one by a feature.
    fn workspace(edges: &[(&str, &[&str])]) -> Vec<Package> {
        let dependency = |edge: &&str| {
            let (kind, name) = edge.split_once(' ').unwrap_or(("", edge));
            Dependency {
                name: name.to_owned(),
                dev: kind == "dev",
                optional: kind == "optional",
            }
        };
        let package = |(name, to): &(&str, &[&str])| Package {
            name: (*name).to_owned(),
            dependencies: to.iter().map(dependency).collect(),
            ..Package::default()
        };
        edges.iter().map(package).collect()
    }

    /// The workspace as it should be, with one edge more.
    fn with_edge(from: &str, to: &str) -> Vec<Package> {
        let mut packages = workspace(&[
            ("dsp-core", &["burn", "rayon", "dev proptest"]),
            ("dsp-strategies", &["dsp-core"]),
            (
                "dsp-models",
                &["burn", "dsp-core", "dev dsp-strategies", "dev toml"],
            ),
            (
                "dsp-bench",
                &["clap", "dsp-core", "dsp-models", "dsp-strategies", "toml"],
            ),
            ("xtask", &["clap"]),
        ]);
        let edge = workspace(&[(from, &[to])]).remove(0);
        for package in packages.iter_mut().filter(|package| package.name == from) {
            package.dependencies.extend(edge.dependencies.clone());
        }
        packages
    }

    /// What is said of the one edge that is wrong.
    fn the_fault(from: &str, to: &str) -> String {
        let broken = broken_edges(&with_edge(from, to));
        assert_eq!(broken.len(), 1, "{from} -> {to}: {broken:?}");
        broken[0].clone()
    }

    #[test]
    fn the_workspace_as_it_should_be_breaks_no_rule() {
        assert_eq!(broken_edges(&with_edge("dsp-bench", "serde")), [""; 0]);
    }

    #[test]
    fn a_model_that_depends_on_strategies_is_named_with_its_rule() {
        let fault = the_fault("dsp-models", "dsp-strategies");
        assert!(
            fault.starts_with("dsp-models -> dsp-strategies: "),
            "{fault}"
        );
        assert!(fault.contains("never a strategy"), "{fault}");
    }

    #[test]
    fn every_arrow_that_points_up_or_sideways_is_refused() {
        for (from, to) in [
            ("dsp-core", "dsp-strategies"),
            ("dsp-core", "dsp-models"),
            ("dsp-strategies", "dsp-models"),
            ("xtask", "dsp-core"),
        ] {
            let fault = the_fault(from, to);
            assert!(
                fault.starts_with(&format!("{from} -> {to}: arrows")),
                "{fault}"
            );
        }
    }

    #[test]
    fn nothing_depends_on_a_program_not_even_a_test() {
        for (from, to) in [
            ("dsp-core", "dsp-bench"),
            ("dsp-models", "dev dsp-bench"),
            ("dsp-bench", "xtask"),
            ("dsp-strategies", "dev xtask"),
        ] {
            assert!(the_fault(from, to).contains("a program"));
        }
    }

    #[test]
    fn command_line_and_charts_are_refused_in_core_but_not_in_its_tests() {
        for to in NOT_IN_CORE {
            assert!(
                the_fault("dsp-core", to)
                    .starts_with(&format!("dsp-core -> {to}: dsp-core knows neither"))
            );
        }
        assert_eq!(broken_edges(&with_edge("dsp-core", "dev toml")), [""; 0]);
    }

    #[test]
    fn an_asynchronous_runtime_is_refused_in_core_unless_a_feature_brings_it() {
        for to in RUNTIMES {
            let fault = the_fault("dsp-core", to);
            assert!(fault.contains("only where a feature needs one"), "{fault}");
            let optional = format!("optional {to}");
            assert_eq!(broken_edges(&with_edge("dsp-core", &optional)), [""; 0]);
        }
        assert!(the_fault("dsp-core", "optional clap").contains("knows neither"));
    }

    #[test]
    fn a_new_crate_must_be_given_a_place() {
        let broken = broken_edges(&workspace(&[("dsp-extra", &["dsp-core"])]));
        assert!(
            broken.len() == 1 && broken[0].contains("`dsp-extra` has no place"),
            "{broken:?}"
        );
    }

    #[test]
    fn the_layers_themselves_have_no_circle() {
        for (index, (name, below)) in LAYERS.iter().enumerate() {
            for other in *below {
                let known = LAYERS[..index].iter().any(|(earlier, _)| earlier == other);
                assert!(known, "{name} may depend on {other}, which stands above it");
            }
        }
    }

    #[test]
    fn a_strategy_as_a_feature_of_the_models_is_refused() {
        let models = Package {
            features: vec!["default".into(), "flex".into(), "ulysses".into()],
            ..Package::default()
        };
        assert_eq!(models.strategies(), ["ulysses"]);
        assert_eq!(
            strategy_features(&models, &["dsp".into(), "ulysses".into()]).len(),
            1
        );
        assert_eq!(strategy_features(&models, &["dsp".into()]), [""; 0]);
    }

    #[test]
    fn a_strategy_is_found_in_code_in_strings_and_inside_identifiers() {
        let strategies = ["dsp", "ulysses", "ring"].map(String::from);
        for (line, name) in [
            ("use dsp_strategies::Ulysses;", "ulysses"),
            ("if name == \"ULYSSES\" {", "ulysses"),
            ("let use_ulysses = true;", "ulysses"),
            ("fn attend(strategy: &Dsp) {", "dsp"),
            ("struct DSPPlan;", "dsp"),
            ("struct MyDspPlan;", "dsp"),
            ("#[cfg(feature = \"dsp\")]", "dsp"),
            ("    RingAttention::new(x) // whatever", "ring"),
            ("let ring_attention = 1;", "ring"),
        ] {
            let source = format!("//! Runs under DSP or Ulysses.\n\n{line}\n");
            assert_eq!(
                strategy_names(&source, &strategies),
                [(3, name.to_owned())],
                "{line}"
            );
        }
    }

    #[test]
    fn crates_commands_comments_and_other_words_name_no_strategy() {
        let strategies = ["dsp", "ring", "lss"].map(String::from);
        for line in [
            "use dsp_core::{Shard, SequenceParallel};",
            "see(\"dsp-core\", \"run `dsp verify FILE`\");",
            "    /// Runs under DSP, or as a ring.",
            "let string: String = wiring(Strings::new(), lossless);",
            "",
        ] {
            assert_eq!(strategy_names(line, &strategies), [], "{line}");
        }
    }

    #[test]
    fn cargo_metadata_is_read_as_declared() {
        let json = r#"{"packages": [{
            "name": "dsp-models", "manifest_path": "/there/dsp-models/Cargo.toml", "features": {"default": [], "dsp": []},
            "dependencies": [{"name": "burn", "kind": null}, {"name": "toml", "kind": "dev"}, {"name": "cc", "kind": "build"}]
        }]}"#;
        let packages = packages_of(&serde_json::from_str(json).unwrap()).unwrap();
        let models = Package::find(&packages, "dsp-models").unwrap();
        assert_eq!(models.folder, Path::new("/there/dsp-models"));
        assert_eq!(models.strategies(), ["dsp"]);
        let dev: Vec<_> = models
            .dependencies
            .iter()
            .map(|dependency| (dependency.name.as_str(), dependency.dev))
            .collect();
        assert_eq!(dev, [("burn", false), ("toml", true), ("cc", false)]);
        assert!(Package::find(&packages, "dsp-core").is_err());
        assert!(packages_of(&Value::Null).is_err());
    }
}
