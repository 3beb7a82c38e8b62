//! Compiles the tracker's BPF programs with clang. Says which Debian packages are missing, and does nothing else.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

const SOURCE: &str = "bpf/tracker.bpf.c";
/// What the programs can be built to do wrong, for tests that must notice.
const FAULTS: [&str; 5] = ["ISSUE_ONLY", "COMPLETION_ONLY", "DROP", "HOLD", "REFUSED"];
const PACKAGES: &str = "hint: apt-get install clang llvm libbpf-dev linux-libc-dev";

fn main() {
    println!("cargo::rerun-if-changed=bpf");
    println!("cargo::rerun-if-env-changed=CLANG");
    build("tracker", None);
    if env::var_os("CARGO_FEATURE_SABOTAGE").is_some() {
        for fault in FAULTS {
            build(&format!("tracker_{}", fault.to_lowercase()), Some(fault));
        }
    }
}

fn build(name: &str, fault: Option<&str>) {
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".to_owned());
    let folder = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let object = folder.join(format!("{name}.bpf.o"));
    match compile(&clang, &object).args(fault.map(|fault| format!("-DSABOTAGE_{fault}"))).output() {
        Err(error) => fail(&format!("run {clang}: {error}")),
        Ok(output) if !output.status.success() => {
            fail(&format!("compile {SOURCE}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)));
        }
        Ok(output) if !output.stderr.is_empty() => {
            println!("cargo::warning={}", String::from_utf8_lossy(&output.stderr).replace('\n', " "));
        }
        Ok(_) => {}
    }
}

fn compile(clang: &str, object: &Path) -> Command {
    let architecture = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets it");
    let endian = env::var("CARGO_CFG_TARGET_ENDIAN").expect("cargo sets it");
    let mut command = Command::new(clang);
    // -mcpu=v3: atomics that give back what they found, which are full barriers. -g: types for CO-RE.
    command.args(["-O2", "-g", "-mcpu=v3", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror"]);
    command.args(["-target", if endian == "big" { "bpfeb" } else { "bpfel" }]);
    command.arg(format!("-D__TARGET_ARCH_{}", if architecture == "x86_64" { "x86" } else { "arm64" }));
    command.arg("-idirafter").arg(format!("/usr/include/{architecture}-linux-gnu"));
    // Paths stay out of the object, so that it is the same wherever it is built.
    command.args(["-fdebug-compilation-dir=.", "-I", "bpf", "-c", SOURCE, "-o"]).arg(object);
    command
}

fn fail(reason: &str) -> ! {
    eprintln!("error: the tracker's BPF programs could not be built: {reason}\n{PACKAGES}");
    exit(1)
}
