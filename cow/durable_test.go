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
