// Files in the run directory that are cut short while the daemon has them mapped.

package test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// TestFilesCutShort empties each file that the daemon maps for a device while clients
// write. The clients see no error, the device keeps what they wrote, what becomes of the
// snapshot is told, and the device can be snapshotted again.
func TestFilesCutShort(t *testing.T) {
	needRoot(t)
	const size = 4 * miB
	for _, name := range []string{"lease", "changes", "layers", "layer-0"} {
		t.Run(name, func(t *testing.T) {
			d, origin := serveOrigin(t, size)
			d.blksnap("snapshot", "create", "before")
			generation := read(t, d.device("vda", "cbt", "generation"))

			want := content(t, origin)
			stop := make(chan struct{})
			var clients sync.WaitGroup
			end := sync.OnceFunc(func() { close(stop); clients.Wait() })
			t.Cleanup(end)
			for k := range 2 {
				c := d.open("vda")
				clients.Go(func() {
					for n := 0; ; n++ {
						select {
						case <-stop:
							return
						default:
						}
						off := int64(k)*size/2 + int64(n)*4096%(size/2)
						p := bytes.Repeat([]byte{byte(1 + n%255)}, 4096)
						if err := c.writeAt(p, off); err != nil {
							t.Errorf("write at %d: %v", off, err)
							return
						}
						copy(want[off:], p)
					}
				})
			}
			if err := os.Truncate(filepath.Join(d.runDir, "devices", "vda", name), 0); err != nil {
				t.Fatal(err)
			}
			if name == "layers" { // which is touched by whoever takes a snapshot
				d.try("snapshot", "create", "meanwhile")
			}
			eventually(t, "a new generation begins", func() bool {
				return read(t, d.device("vda", "cbt", "generation")) != generation
			})
			end()
			for _, part := range []string{"generation  vda", "snapshot-failed  vda  before", name + " cannot be read any more"} {
				if got := d.blksnap("events"); !strings.Contains(got, part) {
					t.Errorf("events do not tell %q:\n%s", part, got)
				}
			}
			d.blksnap("snapshot", "create", "after")
			if err := d.open("vda").writeAt(make([]byte, size/2), 0); err != nil {
				t.Fatal(err)
			}
			if got := content(t, d.snapshot("after", "vda.img")); !bytes.Equal(got, want) {
				t.Error("the new snapshot is not what the device was")
			}
			clear(want[:size/2])
			if got := content(t, origin); !bytes.Equal(got, want) {
				t.Error("the origin is not what was written")
			}
		})
	}
}

// content is what is in a file.
func content(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
