package cow

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// brokenFile fails every write once it is broken.
type brokenFile struct {
	durableFile
	broken atomic.Bool
}

func (f *brokenFile) WriteAt(p []byte, off int64) (int, error) {
	if f.broken.Load() {
		return 0, syscall.EIO
	}
	return f.durableFile.WriteAt(p, off)
}

// awaitDurable waits until the device keeps its map by a record other than was.
func awaitDurable(t *testing.T, d *Device, was *durable) *durable {
	t.Helper()
	for begun := time.Now(); time.Since(begun) < 10*time.Second; time.Sleep(time.Millisecond) {
		if u := d.durable.Load(); u != nil && u != was {
			return u
		}
	}
	t.Fatal("the device does not keep its change map")
	return nil
}

// TestStateCannotBeWritten breaks the record of regions under everything that
// writes it. What asked for it goes on, the generation ends and says why, and the
// next one is kept.
func TestStateCannotBeWritten(t *testing.T) {
	for _, tc := range []struct {
		name, why string
		do        func(d *Device) error
	}{
		{"write", "record a region: ", func(d *Device) error { return d.Write([]byte{1}, 0, false) }},
		{"snapshot", "reserve a number: ", func(d *Device) error {
			// More than are reserved already.
			for k := range 2 * reserveStep {
				if _, err := d.cat.Take(fmt.Sprint(k), []*Device{d}, TakeOptions{Limit: time.Minute}); err != nil {
					return err
				}
			}
			return nil
		}},
		{"checkpoint", "drop regions from the record: ", func(d *Device) error {
			if err := d.checkpoint(); !errors.Is(err, syscall.EIO) {
				return errors.New("a checkpoint over a broken record does not fail with EIO")
			}
			return nil
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := newHome(t, 1<<20)
			h.state = t.TempDir()
			h.open()
			awaitDurable(t, h.dev, nil)
			h.close()

			ended := make(chan string, 8)
			h.notify = func(e Event) {
				if e.Kind == EventGeneration {
					ended <- e.Text
				}
			}
			h.open() // goes on with the record at once
			d := h.dev
			u, was := d.durable.Load(), d.Changes().Generation()
			f := &brokenFile{durableFile: u.regions.file}
			u.regions.file = f
			f.broken.Store(true)
			if err := tc.do(d); err != nil {
				t.Fatal(err)
			}
			select {
			case got := <-ended:
				if !strings.Contains(got, ": "+tc.why) {
					t.Errorf("why the generation has ended\n got %s\nwant %s...", got, tc.why)
				}
			case <-time.After(10 * time.Second):
				t.Fatal("the generation goes on over a record that cannot be written")
			}
			awaitDurable(t, d, u)
			now := d.Changes().Generation()
			h.close()

			h.notify = nil
			h.open()
			defer h.close()
			if got := h.dev.Changes().Generation(); got != now || got == was {
				t.Errorf("generation after a restart\n got %s\nwant %s, not %s", got, now, was)
			}
		})
	}
}

// TestWarning has the state disk fail, and hang, while the map is written down: who asks
// is told for as long as that is so.
func TestWarning(t *testing.T) {
	h := newHome(t, 1<<20)
	h.state = t.TempDir()
	var fails atomic.Pointer[func(what string) error]
	h.disk = &stepDisk{step: func(string) {}, fail: func(what string) error {
		if f := fails.Load(); f != nil {
			return (*f)(what)
		}
		return nil
	}}
	setFails := func(f func(what string) error) { fails.Store(&f) }
	want := func(when, prefix string) {
		t.Helper()
		if got := h.dev.Warning(); !strings.HasPrefix(got, prefix) || (got == "") != (prefix == "") {
			t.Errorf("%s: the warning is\n got %q\nwant %q...", when, got, prefix)
		}
	}
	h.open()
	defer h.close()
	h.waitDurable()
	h.writeDown()
	want("at first", "")

	setFails(func(what string) error {
		if what == "make map.new" {
			return syscall.ENOSPC
		}
		return nil
	})
	h.writeDown()
	want("without space for the map", "the change map cannot be written down: no space left on device")
	fails.Store(nil)
	h.writeDown()
	want("with space again", "")

	setFails(func(what string) error { return syscall.EIO })
	h.dev.keeping <- struct{}{}
	u := h.dev.durable.Swap(nil)
	h.dev.writeDown()
	<-h.dev.keeping
	if err := u.regions.file.Close(); err != nil {
		t.Error(err)
	}
	want("without a record", "change tracking does not outlive the machine: ")
	fails.Store(nil)
	h.writeDown()
	want("with a record again", "")

	entered, release := make(chan struct{}), make(chan struct{})
	setFails(func(what string) error {
		if what == "make map.new" {
			close(entered)
			<-release
		}
		return nil
	})
	hangs := begin(func() error { h.writeDown(); return nil })
	<-entered
	h.dev.writing.Add(int64(time.Hour)) // whatever has passed
	want("at once", "")
	h.dev.writing.Add(int64(-2 * time.Hour))
	want("after an hour", "the change map cannot be written down: no answer for 1h0m")
	fails.Store(nil)
	close(release)
	<-hangs
	want("with an answer", "")
}
