// State disks that are full, read-only or broken when the daemon is stopped.

package test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// stateDisks are what a state directory may be on. make returns the directory, and what
// breaks the disk and makes it whole again.
var stateDisks = []struct {
	name string
	make func(t *testing.T) (dir string, spoil, heal func())
	kept bool // the generation goes on, also after a reboot
}{
	{"full", func(t *testing.T) (string, func(), func()) {
		dir := tmpfs(t, "size=1m,mode=700")
		return dir, func() { sh(t, `if head -c 2M /dev/zero > "$1/fill" 2> /dev/null; then exit 1; fi`, dir) }, func() {}
	}, true},
	{"read-only", func(t *testing.T) (string, func(), func()) {
		dir := tmpfs(t, "size=1m,mode=700")
		return dir, func() {
				run(t, "mount", "--bind", dir, dir)
				run(t, "mount", "-o", "remount,bind,ro", dir)
			}, func() {
				if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
					t.Error(err)
				}
			}
	}, true},
	{"broken", func(t *testing.T) (string, func(), func()) {
		need(t, "mkfs.ext4")
		disk, broken := filepath.Join(scratch(t), "disk.img"), filepath.Join(scratch(t), "broken")
		write(t, disk, make([]byte, 8*miB))
		run(t, "mkfs.ext4", "-q", disk)
		dev := loop(t, nbdkitFile(t, disk, "--filter=error", "error-rate=100%", "error-file="+broken), false)
		dir := mount(t, dev, "ext4", "errors=remount-ro")
		return dir, func() { write(t, broken, nil) }, func() {
			if err := os.Remove(broken); err != nil {
				t.Error(err)
			}
			if err := unmount(dir); err != nil {
				t.Error(err)
			}
			run(t, "mount", "-t", "ext4", dev, dir)
		}
	}, false},
}

// A daemon that is stopped over such a disk ends in order, and says what it could not
// write. The next start goes on where nobody wrote meanwhile and somebody knows what was
// written, also after a reboot; never with an old
// generation over what nobody knows.
func TestStopOverABadStateDisk(t *testing.T) {
	needRoot(t)
	for _, disk := range stateDisks {
		for _, then := range []struct {
			name            string
			reboot, foreign bool
		}{
			{"and started", false, false},
			{"and a reboot", true, false},
			{"and a reboot, and the origin written", true, true},
		} {
			t.Run(disk.name+" "+then.name, func(t *testing.T) {
				const size = miB
				origin := makeOrigin(t, scratch(t), "vda", size)
				dir, spoil, heal := disk.make(t)
				d := newDaemon(t, nil)
				d.state = dir
				args := []string{origin, "--store", "file:" + d.dir + "/store:8MiB"}
				d.start(args...)
				generation := read(t, d.device("vda", "cbt", "generation"))
				eventually(t, "the change map is written down", func() bool { return exists(filepath.Join(d.state, "devices", "vda", "map")) })
				mkdir(t, d.snapshot("s1"))
				number := read(t, d.device("vda", "cbt", "number"))
				live, p := d.open("vda"), make([]byte, 64*kiB)
				Stamp(p, "vda", 0, 2)
				if err := live.writeAt(p, 0); err != nil {
					t.Fatal(err)
				}
				spoil()
				if err := live.writeAt(p, 0); err != nil {
					t.Fatalf("a write while the state disk is %s: %v", disk.name, err)
				}
				live.Close()
				if got := read(t, d.device("vda", "state")); got != "ok" {
					t.Errorf("state of the device: got %s, want ok", got)
				}

				d.signal(syscall.SIGTERM)
				const says = "cannot be written" // the map at the end, or all of it before
				if got := d.cmd.ProcessState.ExitCode(); got != 0 || !strings.Contains(d.stderr.String(), says) {
					t.Errorf("after SIGTERM the daemon ended with %v, want status 0, and that something %s", d.cmd.ProcessState, says)
				}
				heal()
				if then.foreign {
					sh(t, `printf x | dd of="$1" bs=1 seek=70000 conv=notrunc 2> /dev/null`, origin)
				}

				if then.reboot {
					d.reboot()
				}
				d.start(args...)
				now := read(t, d.inside(d.device("vda", "cbt", "generation")))
				// (A broken disk may have cost the generation before the stop already.)
				if want := !then.foreign && disk.kept; (now == generation) != want && (disk.kept || then.reboot) {
					t.Errorf("the generation goes on: %v, want %v", now == generation, want)
				}
				since := d.inside(d.device("vda", "cbt", "since", number))
				if now != generation && exists(since) {
					t.Error("the new generation answers for a number of the old one")
				}
				if now == generation {
					want := "0 65536 data"
					if then.reboot {
						want = fmt.Sprintf("0 %d data\n%d %d zero", size/2, size/2, size/2) // all of the region
					}
					if got := read(t, since); got != want {
						t.Errorf("changed since the snapshot\n got %q\nwant %q", got, want)
					}
				}
				if then.reboot {
					return
				}
				image, err := os.ReadFile(d.snapshot("s1", "vda.img"))
				if err == nil {
					err = Verify(image[:len(p)], "vda", 0, 1, 1)
				}
				if err != nil || !bytes.Equal(image[size/2:], make([]byte, size/2)) {
					t.Errorf("the image is another: %v", err)
				}
			})
		}
	}
}
