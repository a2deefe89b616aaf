// Parts of the snapstore that come while snapshots are open.

package test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestStoreGrowsInTime runs blksnap store add from --on-store-low, as the manual
// shows it, while more is written than the store holds at first: no snapshot is
// lost, nor by a restart.
func TestStoreGrowsInTime(t *testing.T) {
	needRoot(t)
	dir := scratch(t)
	grow := filepath.Join(dir, "grow.sh")
	// $BLKSNAP stands for the path of the program.
	script := "n=$(ls " + dir + "/part-* 2>/dev/null | wc -l)\n" +
		"echo size $BLKSNAP_STORE_SIZE free $BLKSNAP_STORE_FREE rate $BLKSNAP_STORE_RATE left $BLKSNAP_STORE_LEFT >> " + dir + "/told\n" +
		blksnapPath + " store add file:" + dir + "/part-$n:96MiB\n"
	write(t, grow, []byte(script))
	d, origin := serveOrigin(t, 256*miB, "--store", "file:"+filepath.Join(dir, "first")+":96MiB",
		"--store-wait", "30s", "--on-store-low", "sh "+grow)
	before := make([]byte, 256*miB)
	content, err := os.ReadFile(origin)
	if err != nil {
		t.Fatal(err)
	}
	copy(before, content)
	mkdir(t, d.snapshot("s"))
	live := d.open("vda")
	p := make([]byte, miB)
	for off := int64(0); off < 192*miB; off += miB {
		Stamp(p, "vda", off, 2)
		if err := live.writeAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	live.Close()
	check := func(when string) {
		t.Helper()
		if got := read(t, d.snapshot("s", "state")); got != "ok" {
			t.Errorf("%s: the snapshot is %s\n%s", when, got, d.stderr)
		}
		image, err := os.ReadFile(d.snapshot("s", "vda.img"))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(image, before) {
			t.Errorf("%s: the image is not what the device held", when)
		}
	}
	check("after it was written over")
	if told := read(t, dir, "told"); !strings.Contains(told, "size 100663296 free ") {
		t.Errorf("the command was told %q", told)
	}
	parts := len(d.json("store", "list", "--json"))
	if parts < 2 {
		t.Errorf("%d part of the store, want more", parts)
	}
	d.kill()
	d.start(origin, "--store", "file:"+filepath.Join(dir, "first")+":96MiB")
	check("after a restart")
	if got := len(d.json("store", "list", "--json")); got != parts {
		t.Errorf("after a restart there are %d parts, want %d", got, parts)
	}
}
