package cow

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"blksnap/store"
)

// TestOtherName serves one origin under the name a, then under b, and under a again. What
// was written as b is in no map of a: where it was, a begins a new generation and says
// why, and its snapshots are failed or gone.
func TestOtherName(t *testing.T) {
	const size = 4 << 20
	for _, tc := range []struct {
		name   string
		block  bool
		others []string // names between a and a
		write  bool
		reboot bool // before each start
		kept   bool
		why    string
		killed bool // a is, and its leases run on for long
	}{
		{"a file, the same name", false, []string{"a"}, true, false, true, "", false},
		{"a file, another name, written", false, []string{"b"}, true, false, false, "written or changed behind our back", false},
		{"a file, another name, not written", false, []string{"b"}, false, false, true, "", false},
		{"a disk, the same name", true, []string{"a"}, true, false, true, "", false},
		{"a disk, another name", true, []string{"b"}, true, false, false, `served as device "b" meanwhile`, false},
		{"a disk, two other names", true, []string{"b", "c"}, true, false, false, `served as device "c" meanwhile`, false},
		{"a disk, the same name, rebooted", true, []string{"a"}, true, true, true, "", false},
		{"a disk, another name, rebooted", true, []string{"b"}, true, true, false, "given up before the machine went down", false},
		{"a file, another name, rebooted", false, []string{"b"}, true, true, false, "written or changed behind our back", false},
		{"a partition, its disk", true, []string{"whole"}, true, false, false, `served as device "whole" meanwhile`, false},
		{"a partition, another one", true, []string{"second"}, true, false, true, "", false},
		{"a file, the same name, killed", false, []string{"a"}, true, false, true, "", true},
		{"a file, another name, killed, written", false, []string{"b"}, true, false, false, `served as device "b" meanwhile`, true},
		{"a file, another name, killed, not written", false, []string{"b"}, false, false, false, `served as device "b" meanwhile`, true},
		{"a file, another link, killed, written", false, []string{"link"}, true, false, false, `served as device "link" meanwhile`, true},
		{"a file, another name, killed and rebooted", false, []string{"b"}, true, true, false, "given up before the machine went down", true},
		{"a disk, another name, killed", true, []string{"b"}, true, false, false, `served as device "b" meanwhile`, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			origin := filepath.Join(dir, "disk")
			if err := os.WriteFile(origin, make([]byte, size), 0o600); err != nil {
				t.Fatal(err)
			}
			if tc.block {
				origin = newLoop(t, origin)
			}
			origins := map[string]string{"a": origin, "b": origin, "c": origin, "link": origin + ".link"}
			if !tc.block {
				if err := os.Link(origin, origins["link"]); err != nil {
					t.Fatal(err)
				}
			}
			if strings.HasPrefix(tc.name, "a partition") {
				origins = map[string]string{"whole": origin, "a": addPartition(t, origin, 1, 0, size-1<<20), "second": addPartition(t, origin, 2, size-1<<20, 1<<20)}
			}
			boot, boots := thisBoot(t), 0
			// serve returns the generation, and why it is a new one.
			serve := func(name string, use func(d *Device)) (generation, why string) {
				t.Helper()
				now := boot
				if tc.reboot {
					boots++
					now = strings.Repeat(string(rune('0'+boots)), len(boot))
				}
				cat, lost, err := openSoundCatalogue(filepath.Join(dir, "run"), now)
				if err != nil || lost != nil {
					t.Fatal(err, lost)
				}
				cat.state = filepath.Join(dir, "state")
				part, err := store.OpenFile(filepath.Join(dir, "store"), 16<<20, false)
				if err != nil {
					t.Fatal(err)
				}
				pool := store.NewPool(part)
				o, err := OpenOrigin(origins[name])
				if err != nil {
					t.Fatal(err)
				}
				d, err := cat.Open(o, pool, Config{Name: name, Notify: func(e Event) {
					if e.Kind == EventGeneration {
						why = e.Text
					}
				}})
				if err != nil {
					t.Fatal(err)
				}
				if _, _, err := cat.Recover(); err != nil {
					t.Fatal(err)
				}
				awaitDurable(t, d, nil)
				use(d)
				generation = d.Changes().Generation()
				for _, err := range []error{d.Close(), pool.Close(), cat.Close()} {
					if err != nil {
						t.Error(err)
					}
				}
				return generation, why
			}
			if err := os.Mkdir(filepath.Join(dir, "run"), 0o700); err != nil {
				t.Fatal(err)
			}
			write := func(d *Device) {
				if tc.write {
					put(t, d, 1, d.Size()/2, 4096) // not where a fingerprint looks
				}
			}
			left := t.TempDir()
			was, _ := serve("a", func(d *Device) {
				write(d)
				if tc.killed {
					later := time.Now().Add(time.Hour)
					d.prolongLease(later.UnixNano())
					if err := d.durable.Load().regions.extend(later); err != nil {
						t.Fatal(err)
					}
					copyTree(t, dir, left)
				}
			})
			if tc.killed {
				for _, name := range []string{"run", "state"} {
					path := filepath.Join(dir, name)
					if err := errors.Join(os.RemoveAll(path), os.Rename(filepath.Join(left, name), path)); err != nil {
						t.Fatal(err)
					}
				}
			}
			for _, name := range tc.others {
				serve(name, write)
			}
			now, why := serve("a", func(*Device) {})
			if kept := now == was; kept != tc.kept || !strings.Contains(why, tc.why) {
				t.Errorf("generation kept: %v, because %q\nwant %v, %q", kept, why, tc.kept, tc.why)
			}
		})
	}
}

// addPartition makes the range a partition of a loop device until the test ends.
func addPartition(t *testing.T, disk string, number int32, off, n int64) (path string) {
	t.Helper()
	f, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	change := func(op int32) error {
		p := unix.BlkpgPartition{Start: off, Length: n, Pno: number}
		a := unix.BlkpgIoctlArg{Op: op, Datalen: int32(unsafe.Sizeof(p)), Data: (*byte)(unsafe.Pointer(&p))}
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKPG, uintptr(unsafe.Pointer(&a))); errno != 0 {
			return errno
		}
		return nil
	}

	if err := change(unix.BLKPG_ADD_PARTITION); err != nil {
		t.Fatalf("make partition %d of %s: %v", number, disk, err)
	}
	t.Cleanup(func() {
		if err := errors.Join(change(unix.BLKPG_DEL_PARTITION), f.Close()); err != nil {
			t.Errorf("remove partition %d of %s: %v", number, disk, err)
		}
	})
	path = fmt.Sprintf("%sp%d", disk, number)
	for begun := time.Now(); ; time.Sleep(time.Millisecond) { // until its node is there
		if _, err := os.Stat(path); err == nil {
			return path
		} else if time.Since(begun) > 20*time.Second {
			t.Fatal(err)
		}
	}
}

func TestStampTells(t *testing.T) {
	now := time.Now()
	for _, tc := range []struct {
		name  string
		left  time.Duration // of the lease
		clean bool
		want  bool
	}{
		{"it runs", time.Millisecond, false, false},
		{"it has just ended, and a stamp may be from before that", -20 * time.Millisecond, false, false},
		{"it ended long ago", -time.Minute, false, true},
		{"it is the last stamp itself", -20 * time.Millisecond, true, true},
	} {
		if got := stampTells(now.Add(tc.left).UnixNano(), tc.clean, now); got != tc.want {
			t.Errorf("%s: got %v, want %v", tc.name, got, tc.want)
		}
	}
}
