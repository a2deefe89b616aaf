package cow

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blksnap/store"
)

// stamped is an origin whose change time the test sets.
type stamped struct {
	originFile
	changed *int64
}

func (f stamped) identify(bool) (identity, error) {
	size, err := f.size()
	return identity{ino: 1, size: size, changed: *f.changed}, err
}

// TestStampAfterAnEnd has somebody else's write stamp an origin while its device is
// closed. After a clean end our own last stamp is known, so any other is somebody else's,
// also where the clock was set back meanwhile. After a kill it is at least known what the
// stamp was when the last snapshot was taken.
func TestStampAfterAnEnd(t *testing.T) {
	const begun, taken, left = 1000, 1500, 2000
	for _, tc := range []struct {
		name   string
		stamp  int64
		killed bool
		why    string
		back   time.Duration // the clock was set back since the snapshot
	}{
		{"no write", left, false, "", 0},
		{"later", left + 1, false, "written or changed behind our back", 0},
		{"earlier, by a clock that was set back", left - 1, false, "restored to an earlier state", 0},
		{"from before our start", begun - 1, false, "restored to an earlier state", 0},
		{"killed, within the lease", left, true, "", 0},
		{"killed, from after the last snapshot", taken, true, "", 0}, // what came then is marked
		{"killed, from before the last snapshot", taken - 1, true, "restored to an earlier state", 0},
		{"killed, from before our start", begun - 1, true, "restored to an earlier state", 0},
		{"killed, from before the last snapshot by a clock that was set back", taken - 1, true, "", time.Second},
		{"killed, from before our start, the same", begun - 1, true, "", time.Hour},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := newHome(t, siteSize)
			changed := int64(begun)
			h.wrap = func(f originFile) originFile { return stamped{f, &changed} }
			h.open()
			changed = taken
			h.take("s")
			put(t, h.dev, 1, 0, chunkSize)
			was := h.dev.Changes().Generation()
			changed = left
			next := h
			if tc.killed { // what that leaves
				next = &home{t: t, dir: t.TempDir(), size: h.size, wrap: h.wrap}
				copyTree(t, h.dir, next.dir)
			}
			h.close()
			changed, h = tc.stamp, next
			if tc.back > 0 {
				booted := uint64(bootTime() + int64(tc.back))
				edit(t, h.layer("lease"), func(b []byte) { host.PutUint64(b[clockAt:], booted) })
			}
			snaps := h.open()
			defer h.close()
			kept, state := h.dev.Changes().Generation() == was, image(t, snaps["s"], "vda").State()
			if tc.why == "" && (!kept || state != "ok") {
				t.Errorf("nobody wrote: the generation is kept: %v, the image is %s", kept, state)
			}
			if tc.why != "" && (kept || !strings.Contains(state, tc.why) || !strings.Contains(h.dev.Tracking().Reason(), tc.why)) {
				t.Errorf("the generation is kept: %v, because %q; the image is %s\nwant a new one, a failed image, and %s", kept, h.dev.Tracking().Reason(), state, tc.why)
			}
		})
	}
}

// TestBehindOurBackOverAReboot changes files after the machine was started again, before
// us: after a clean end, and after one that nobody saw coming, with the durable lease
// still running.
func TestBehindOurBackOverAReboot(t *testing.T) {
	const size = 1 << 20
	for _, killed := range []bool{false, true} {
		for _, tc := range []struct {
			name string
			do   func(path string) error
			why  string
		}{
			{"nothing", func(string) error { return nil }, ""},
			{"written", func(path string) error { return writeByte(path) }, "written or changed behind our back"},
			{"written, and its times put back", func(path string) error {
				st, err := os.Stat(path)
				if err != nil {
					return err
				}
				return errors.Join(writeByte(path), os.Chtimes(path, st.ModTime(), st.ModTime()))
			}, "written or changed behind our back"},
			{"cut", func(path string) error { return os.Truncate(path, size/2) }, "size was changed"},
			{"grown", func(path string) error { return os.Truncate(path, 2*size) }, "size was changed"},
			{"replaced", func(path string) error {
				return errors.Join(os.WriteFile(path+".new", make([]byte, size), 0o600), os.Rename(path+".new", path))
			}, "replaced by another file"},
		} {
			name := tc.name
			if killed {
				name += ", after a loss of power"
			}
			t.Run(name, func(t *testing.T) {
				dir, left := t.TempDir(), t.TempDir()
				path := filepath.Join(dir, "disk")
				if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
					t.Fatal(err)
				}
				boot, why := 0, ""
				serve := func(booted int64, use func(d *Device)) string {
					t.Helper()
					boot++
					run := filepath.Join(t.TempDir(), "run")
					if err := os.Mkdir(run, 0o700); err != nil {
						t.Fatal(err)
					}
					cat, err := openCatalogue(run, fmt.Sprintf("%036d", boot))
					if err != nil {
						t.Fatal(err)
					}
					cat.state, cat.booted = filepath.Join(dir, "state"), booted
					o, err := OpenOrigin(path)
					if err != nil {
						t.Fatal(err)
					}
					d, err := cat.Open(o, store.NewPool(), Config{Name: "vda"})
					if err != nil {
						t.Fatal(err)
					}
					why = d.Tracking().Reason()
					use(d)
					if err := errors.Join(d.Close(), cat.Close()); err != nil {
						t.Error(err)
					}
					return d.Tracking().Generation()
				}
				was := serve(1, func(d *Device) {
					awaitDurable(t, d, nil)
					d.keeping <- struct{}{}
					if err := d.checkpoint(); err != nil {
						t.Fatal(err)
					}
					<-d.keeping
					put(t, d, 1, 0, blockSize)
					if killed {
						if err := d.durable.Load().regions.extend(time.Now().Add(time.Hour)); err != nil {
							t.Fatal(err)
						}
						copyTree(t, filepath.Join(dir, "state"), filepath.Join(left, "state"))
					}
				})
				if killed {
					state := filepath.Join(dir, "state")
					if err := errors.Join(os.RemoveAll(state), os.Rename(filepath.Join(left, "state"), state)); err != nil {
						t.Fatal(err)
					}
				}
				booted := time.Now().UnixNano()
				awaitStamps(t, booted)
				if err := tc.do(path); err != nil {
					t.Fatal(err)
				}
				now := serve(booted, func(*Device) {})
				if kept := now == was; kept != (tc.why == "") || !strings.Contains(why, tc.why) {
					t.Errorf("the generation is kept: %v, because %q\nwant %v, %q", kept, why, tc.why == "", tc.why)
				}
			})
		}
	}
}

func writeByte(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte("x"), 70000)
	return errors.Join(err, f.Close())
}

// awaitStamps returns when files are stamped with times beyond after: the clock of the
// stamps is late.
func awaitStamps(t *testing.T, after int64) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "clock")
	for {
		if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		if st.Ctim.Nano() > after {
			return
		}
	}
}
