//! Watches for memory pressure through the kernel's pressure stall information (PSI, see
//! Documentation/accounting/psi.rst). When processes have to wait for memory, the pool is emptied.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::memory::headroom::own_cgroups;

/// Asks the kernel to report when tasks stalled on memory for a total of 150 ms within a window of
/// 2 s. `some` counts the time during which at least one task was stalled. Unprivileged processes
/// can use only windows that are multiples of 2 s.
const TRIGGER: &[u8] = b"some 150000 2000000\0";

/// Opens the first pressure file that accepts the trigger. Tries the files of this process's
/// cgroup, of the cgroup's ancestors, and of the machine, in this order. Returns `None` if no file
/// accepts it.
pub(crate) fn open() -> Option<File> {
    let own = own_cgroups().into_iter().rev().map(|folder| folder.join("memory.pressure"));
    own.chain([Path::new("/proc/pressure/memory").to_owned()]).find_map(|path| {
        let mut file = OpenOptions::new().read(true).write(true).open(path).ok()?;
        file.write_all(TRIGGER).ok()?;
        Some(file)
    })
}

/// Calls `on_pressure` each time the kernel reports pressure. Returns when `stop` becomes
/// readable, if polling fails, or if the pressure file reports an error.
pub(crate) fn watch(pressure: impl AsFd, stop: &OwnedFd, mut on_pressure: impl FnMut()) {
    loop {
        let mut watched = [PollFd::new(&pressure, PollFlags::PRI), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut watched, None) {
            Err(Errno::INTR | Errno::AGAIN | Errno::NOMEM) => continue,
            Err(_) => return,
            Ok(_) => {}
        }
        let [pressure, stop] = watched.each_ref().map(PollFd::revents);
        // Once a cgroup has been removed, polling its file always reports an error.
        if !stop.is_empty() || pressure.intersects(PollFlags::ERR | PollFlags::NVAL | PollFlags::HUP) {
            return;
        }
        if pressure.contains(PollFlags::PRI) {
            on_pressure();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::net::{SendFlags, send};
    use std::net::{TcpListener, TcpStream};
    use std::sync::atomic::{AtomicU32, Ordering};

    /// Uses urgent data on a socket, which raises `POLLPRI` as PSI does.
    #[test]
    fn watch_reports_each_pressure_event_until_stopped() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (receiver, _) = listener.accept().unwrap();
        let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let seen = AtomicU32::new(0);
        std::thread::scope(|scope| {
            let watching = scope.spawn(|| {
                watch(&receiver, &stop, || {
                    let mut byte = [0];
                    let _ = rustix::net::recv(&receiver, &mut byte, rustix::net::RecvFlags::OOB);
                    seen.fetch_add(1, Ordering::SeqCst);
                });
            });
            for count in 1..4 {
                assert_eq!(send(&sender, b"!", SendFlags::OOB), Ok(1));
                while seen.load(Ordering::SeqCst) < count {
                    std::thread::yield_now();
                }
            }
            rustix::io::write(&stop, &1_u64.to_ne_bytes()).unwrap();
            watching.join().unwrap();
        });
        assert_eq!(seen.load(Ordering::SeqCst), 3);
    }

    #[test]
    fn kernel_with_pressure_information_accepts_the_trigger() {
        let has = Path::new("/proc/pressure/memory").exists() && rustix::process::geteuid().is_root();
        assert!(!has || open().is_some());
    }
}
