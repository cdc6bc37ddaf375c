//! Commands: how they are started, shown and judged.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// From which properties draw their cases where all runs, or all processes of one, draw the same.
pub(crate) const SEED: &str = "7";

/// The cargo that runs this task, without the variables that it set for this package: a build
/// script that watches one of them would otherwise run again, and its crate be compiled twice.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_"]
            .iter()
            .any(|own| name.starts_with(own))
        {
            command.env_remove(&*name);
        }
    }
    command
}

/// Shows `command`, runs it with this process's input and output, and fails if it does.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let line = shown(command);
    println!("$ {line}");
    let status = command
        .status()
        .with_context(|| format!("starting `{line}`"))?;
    if !status.success() {
        bail!("`{line}` failed: {status}");
    }
    Ok(())
}

/// What `command` prints on its standard output; fails if it does.
pub(crate) fn output(command: &mut Command) -> Result<Vec<u8>> {
    let line = shown(command);
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("starting `{line}`"))?;
    if !output.status.success() {
        bail!("`{line}` failed: {}", output.status);
    }
    Ok(output.stdout)
}

/// Whether cargo has the subcommand `name`.
pub(crate) fn installed(name: &str) -> bool {
    answers(cargo().args([name, "--version"]))
}

/// Whether `command` can be started and succeeds, whatever it prints.
pub(crate) fn answers(command: &mut Command) -> bool {
    command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// The workspace's own packages as their manifests declare them; nothing is downloaded for this.
pub(crate) fn metadata() -> Result<Value> {
    let json = output(cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
    serde_json::from_slice(&json).context("reading cargo's metadata")
}

/// Where cargo puts what it builds.
pub(crate) fn target_directory() -> Result<PathBuf> {
    let metadata = metadata()?;
    let directory = metadata["target_directory"].as_str();
    Ok(directory
        .context("cargo's metadata names no target_directory")?
        .into())
}

/// Where cargo puts the test binaries of these names, with the place of their name among them: packages may have tests of
/// the same name. `build` says how they are built.
pub(crate) fn test_binaries(build: &mut Command, names: &[&str]) -> Result<Vec<(usize, PathBuf)>> {
    let built = output(build.args(["--no-run", "--message-format", "json"]))?;
    let messages = (built.split(|&byte| byte == b'\n'))
        .filter_map(|line| serde_json::from_slice::<Value>(line).ok());
    let mut found: Vec<(usize, PathBuf)> = messages
        .filter(|message| message["target"]["kind"][0] == "test")
        .filter_map(|message| {
            let name = message["target"]["name"].as_str()?;
            let place = names.iter().position(|known| *known == name)?;
            Some((place, message["executable"].as_str()?.into()))
        })
        .collect();
    found.sort();
    for (place, name) in names.iter().enumerate() {
        if !found.iter().any(|(known, _)| *known == place) {
            bail!("cargo built no test {name}");
        }
    }
    Ok(found)
}

/// `command` as a person would type it.
fn shown(command: &Command) -> String {
    let program = std::path::Path::new(command.get_program());
    let name = program.file_name().unwrap_or(command.get_program());
    let words = std::iter::once(name).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}
