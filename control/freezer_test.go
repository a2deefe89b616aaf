package control

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// disks stands for file systems: it notes what is frozen and thawed, by the base
// names of the mount points.
type disks struct {
	mu   sync.Mutex
	done []string
	hang map[string]chan struct{} // freezing waits for it
	bad  string                   // cannot be frozen
	met  chan string              // gets each that is about to be frozen
}

func (d *disks) ioctl(fd int, request uint, _ int) error {
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return err
	}
	name, what := filepath.Base(path), "thaw "
	if request == fiFreeze {
		what = "freeze "
		d.met <- name
		if gate := d.hang[name]; gate != nil {
			<-gate
		}
		if name == d.bad {
			return syscall.EOPNOTSUPP
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.done = append(d.done, what+name)
	return nil
}

func (d *disks) did() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.done)
}

// TestFreezer freezes several file systems, of which one hangs or fails.
func TestFreezer(t *testing.T) {
	dir := t.TempDir()
	var mounts []string
	for _, name := range []string{"a", "b", "c"} {
		m := filepath.Join(dir, name)
		if err := os.Mkdir(m, 0o700); err != nil {
			t.Fatal(err)
		}
		mounts = append(mounts, m)
	}
	for _, tc := range []struct {
		name   string
		hang   string // ends, or is late, while this one is being frozen
		bad    string
		late   bool
		done   []string // when it has said its last word
		end    []string // what comes after that
		said   string
		status int
	}{
		{"all", "", "", false, []string{"freeze a", "freeze b", "freeze c", "thaw a", "thaw b", "thaw c"}, nil, "frozen\nthawed\n", 0},
		{"too late", "", "", true, []string{"freeze a", "freeze b", "freeze c", "thaw a", "thaw b", "thaw c"}, nil, "frozen\nlate\n", 0},
		{"one cannot", "", "b", false, []string{"freeze a", "thaw a"}, nil, "freeze " + mounts[1] + ": operation not supported\n", 1},
		{"one hangs until we are gone", "b", "", false, []string{"freeze a", "thaw a"}, []string{"freeze b", "thaw b"}, "thawed\n", 0},
		{"one hangs until it is late", "b", "", true, []string{"freeze a", "thaw a"}, []string{"freeze b", "thaw b"}, "late\n", 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := &disks{bad: tc.bad, met: make(chan string, len(mounts)), hang: map[string]chan struct{}{}}
			if tc.hang != "" {
				d.hang[tc.hang] = make(chan struct{})
			}
			z := &freezer{ioctl: d.ioctl}
			over, late := make(chan struct{}), make(chan time.Time, 1)
			said := &said{more: make(chan string, 8)}
			ended := make(chan int, 1)
			go func() { ended <- z.live(mounts, over, late, said) }()
			if tc.hang != "" {
				for name := range d.met {
					if name == tc.hang {
						break
					}
				}
			} else if tc.bad == "" {
				<-said.more // frozen
			}
			switch {
			case tc.late:
				late <- time.Time{}
			case tc.bad == "":
				close(over)
			}
			<-said.more // the last word
			if diff := cmp.Diff(tc.done, d.did()); diff != "" {
				t.Errorf("done when it has said its last word, -want +got:\n%s", diff)
			}
			if tc.hang != "" {
				close(d.hang[tc.hang])
			}
			if got := <-ended; got != tc.status {
				t.Errorf("status\n got %d\nwant %d", got, tc.status)
			}
			if diff := cmp.Diff(append(tc.done, tc.end...), d.did()); diff != "" {
				t.Errorf("done at the end, -want +got:\n%s", diff)
			}
			if got := said.text.String(); got != tc.said {
				t.Errorf("it said\n got %q\nwant %q", got, tc.said)
			}
		})
	}
}

// said is what a freezer says, a line at a time.
type said struct {
	text bytes.Buffer
	more chan string
}

func (s *said) Write(p []byte) (int, error) {
	n, err := s.text.Write(p)
	s.more <- string(p)
	return n, err
}
