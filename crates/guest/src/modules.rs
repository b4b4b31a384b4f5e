//! A kernel package becomes what a guest needs of it: the image, and its modules in the order to load them.
//!
//! Debian's packages come without an index of modules, so `depmod` makes one of the unpacked tree; `modprobe` then
//! tells what each module needs. The result is kept beside the package, for unpacking takes longest.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::debian;
use crate::kernels::Kernel;
use crate::run;

/// An unpacked kernel.
#[derive(Debug)]
pub(crate) struct Unpacked {
    pub(crate) image: PathBuf,
    pub(crate) modules: Vec<Module>,
}

/// One module to load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Module {
    /// A decompressed `.ko`.
    pub(crate) file: PathBuf,
    pub(crate) parameters: String,
}

/// Unpacks what `kernel` needs of its package, unless that was done before.
pub(crate) fn unpack(kernel: &Kernel, package: &Path) -> Result<Unpacked> {
    let ready = package.with_extension("unpacked");
    let list = ready.join("modules.list");
    let wanted = wanted(kernel);
    let kept = fs::read_to_string(&list).unwrap_or_default();
    if kept.lines().next() != Some(&wanted) {
        if let Some(folder) = package.parent() {
            remove_unpacked(folder)?;
        }
        let (tree, partial) = (package.with_extension("tree"), package.with_extension("partial"));
        debian::unpack(package, &tree, &["./boot/vmlinuz-*", "./lib/modules/*"])?;
        fs::create_dir_all(&partial)?;
        let modules = resolve(kernel, &tree, &partial)?;
        fs::rename(image(&tree)?, partial.join("vmlinuz"))?;
        fs::write(partial.join("modules.list"), format!("{wanted}\n{modules}"))?;
        fs::rename(&partial, &ready)?;
        fs::remove_dir_all(&tree)?;
    }
    let kept = fs::read_to_string(&list).with_context(|| format!("can't read {}", list.display()))?;
    let modules = kept.lines().skip(1).map(|line| {
        let (file, parameters) = line.split_once(' ').unwrap_or((line, ""));
        Module { file: ready.join(file), parameters: parameters.to_owned() }
    });
    Ok(Unpacked { image: ready.join("vmlinuz"), modules: modules.collect() })
}

/// What was unpacked of this or another version, whole or not.
fn remove_unpacked(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            fs::remove_dir_all(&path).with_context(|| format!("can't remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// The table's modules as one line, by which a later run sees whether the table has changed.
fn wanted(kernel: &Kernel) -> String {
    let words = kernel.modules.iter().map(|(name, parameters)| format!("{name} {parameters}"));
    words.collect::<Vec<_>>().join(",")
}

fn image(tree: &Path) -> Result<PathBuf> {
    let folder = tree.join("boot");
    let mut entries = fs::read_dir(&folder).with_context(|| format!("can't list {}", folder.display()))?;
    let entry = entries.next().context("the package has no kernel")??;
    Ok(entry.path())
}

/// Decompresses the modules into `folder`, and gives a line `NAME.ko PARAMETERS` for each.
fn resolve(kernel: &Kernel, tree: &Path, folder: &Path) -> Result<String> {
    let releases = tree.join("lib/modules");
    let entry = fs::read_dir(&releases)?.next().context("the package has no modules")??;
    let release = entry.file_name().to_string_lossy().into_owned();
    run::output(run::tool("depmod").arg("-b").arg(tree).arg(&release))?;

    let mut order: Vec<(PathBuf, String)> = Vec::new();
    for (name, parameters) in kernel.modules {
        let mut modprobe = run::tool("modprobe");
        modprobe.args(["-C", "/dev/null", "--show-depends", "-S", &release, "-d"]).arg(tree).arg(name);
        let depends = run::output(&mut modprobe).with_context(|| format!("kernel {} has no module {name}", kernel.id))?;
        append_in_order(&mut order, &depends, parameters)?;
    }

    let mut list = String::new();
    for (file, parameters) in order {
        let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let plain = name.trim_end_matches(".xz");
        if plain == name {
            fs::copy(&file, folder.join(plain))?;
        } else {
            let target = fs::File::create(folder.join(plain))?;
            let status = Command::new("xz").arg("-dc").arg(&file).stdin(Stdio::null()).stdout(target).status()?;
            if !status.success() {
                bail!("can't decompress {}", file.display());
            }
        }
        list.push_str(&format!("{plain} {parameters}\n"));
    }
    Ok(list)
}

/// Appends to `order` what `modprobe --show-depends` printed for one module, which comes last, after those that it
/// needs. Parameters are for the last one only.
fn append_in_order(order: &mut Vec<(PathBuf, String)>, depends: &str, parameters: &str) -> Result<()> {
    let lines = depends.lines().filter(|line| !line.trim().is_empty()).collect::<Vec<_>>();
    for (index, line) in lines.iter().enumerate() {
        let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
        let last = index + 1 == lines.len();
        match verb {
            "builtin" => {}
            "insmod" => {
                let file = PathBuf::from(rest.split(' ').next().unwrap_or_default());
                if !order.iter().any(|(known, _)| *known == file) {
                    order.push((file, if last { parameters.to_owned() } else { String::new() }));
                }
            }
            _ => bail!("modprobe printed a line that isn't understood: {line}"),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need_and_once() {
        let mut order = Vec::new();
        append_in_order(&mut order, "builtin virtio_pci\n", "").unwrap();
        append_in_order(&mut order, "insmod /t/core.ko.xz \ninsmod /t/nvme.ko.xz \n", "").unwrap();
        append_in_order(&mut order, "insmod /t/core.ko.xz \ninsmod /t/vivid.ko.xz \n", "n_devs=1 a=2").unwrap();
        let expected = [("/t/core.ko.xz", ""), ("/t/nvme.ko.xz", ""), ("/t/vivid.ko.xz", "n_devs=1 a=2")];
        assert_eq!(order, expected.map(|(file, parameters)| (PathBuf::from(file), parameters.to_owned())));
    }

    #[test]
    fn other_lines_are_errors() {
        assert!(append_in_order(&mut Vec::new(), "install /bin/true\n", "").is_err());
    }
}
