// The real clients: libnbd's tools, QEMU's, and fio.

package intercept

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// tool runs a client and returns what it prints. It fails the test if the
// client is not there and CI=true, or if its exit status is not 0.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := tryTool(t, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

func tryTool(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is missing", name)
		}
		t.Skipf("%s is missing", name)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = t.TempDir()
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// disk is a memory with data, and zeroes of many lengths, and its content in a
// file for the tools to compare with.
func disk(t *testing.T, size int64) (*tryMemory, string) {
	t.Helper()
	rng := random(t)
	dev := &tryMemory{memory: newMemory(size)}
	m := &model{rng: rng}
	copy(dev.data, m.payload(size))
	path := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(path, dev.data, 0o600); err != nil {
		t.Fatal(err)
	}
	return dev, path
}

// uri is an export of a server on a unix socket.
func uri(addr net.Addr, export string) string {
	return "nbd+unix:///" + export + "?socket=" + addr.String()
}

func TestNbdinfo(t *testing.T) {
	dev := newMemory(1 << 20)
	copy(dev.data[64<<10:], bytes.Repeat([]byte{1}, 64<<10))
	image := newMemory(5000)
	image.readOnly = true
	_, addr := startServer(t, Options{Exports: newShelf(map[string]Device{"disk": dev, "disk@monday": image})})

	out := tool(t, "nbdinfo", "--json", uri(addr, "disk"))
	var info struct {
		Protocol   string
		Structured bool
		Exports    []map[string]any
	}
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		t.Fatalf("nbdinfo --json: %v\n%s", err, out)
	}
	if info.Protocol != "newstyle-fixed" || !info.Structured || len(info.Exports) != 1 {
		t.Fatalf("nbdinfo --json:\n%s", out)
	}
	for key, want := range map[string]any{
		"export-name": "disk", "description": "about disk", "export-size": 1048576.0, "is_read_only": false, "can_multi_conn": true,
		"can_flush": true, "can_fua": true, "can_trim": true, "can_zero": true, "can_fast_zero": true, "can_cache": true, "can_df": true,
		"block_size_minimum": 1.0, "block_size_preferred": 4096.0, "block_size_maximum": 33554432.0,
	} {
		if got := info.Exports[0][key]; got != want {
			t.Errorf("%s\n got %v\nwant %v", key, got, want)
		}
	}
	contexts := fmt.Sprint(info.Exports[0]["contexts"])
	if want := "[base:allocation " + dirtyBitmap + "]"; contexts != want {
		t.Errorf("contexts\n got %s\nwant %s", contexts, want)
	}

	for _, tc := range []struct{ arg, export, want string }{
		{"--map", "disk", "0 65536 3 hole,zero\n65536 65536 0 data\n131072 917504 3 hole,zero\n"},
		{"--map=" + dirtyBitmap, "disk@monday", "0 4096 0 clean\n4096 904 1 dirty\n"},
		{"--size", "disk@monday", "5000\n"},
	} {
		got := regexp.MustCompile(` +`).ReplaceAllString(tool(t, "nbdinfo", tc.arg, uri(addr, tc.export)), " ")
		if got = strings.ReplaceAll("\n"+got, "\n ", "\n")[1:]; got != tc.want {
			t.Errorf("nbdinfo %s\n got %q\nwant %q", tc.arg, got, tc.want)
		}
	}
	if out := tool(t, "nbdinfo", "--list", uri(addr, "")); !strings.Contains(out, `export="disk@monday"`) {
		t.Errorf("nbdinfo --list does not show disk@monday:\n%s", out)
	}
	for _, can := range []string{"write", "trim", "zero"} {
		if _, err := tryTool(t, "nbdinfo", "--can", can, uri(addr, "disk@monday")); err == nil {
			t.Errorf("nbdinfo says that a read-only export can %s", can)
		}
	}
	if out, err := tryTool(t, "nbdinfo", uri(addr, "nobody")); err == nil || !strings.Contains(out, "No such file") {
		t.Errorf("nbdinfo of an unknown export: %v\n%s", err, out)
	}
}

// TestNbdcopy copies out and in, over several connections.
func TestNbdcopy(t *testing.T) {
	dev, path := disk(t, 40<<20)
	addr := serveDevice(t, dev)
	out := filepath.Join(t.TempDir(), "out")
	tool(t, "nbdcopy", "--connections=4", uri(addr, "disk"), out)
	wantFile(t, out, dev.content())

	target := &tryMemory{memory: newMemory(40 << 20)}
	tool(t, "nbdcopy", "--flush", path, uri(serveDevice(t, target), "disk"))
	if !bytes.Equal(target.content(), dev.content()) {
		t.Error("nbdcopy into the server: data differs")
	}
	if target.flushes.Load() == 0 {
		t.Error("nbdcopy --flush did not flush")
	}
}

// wantFile compares a file with data.
func wantFile(t *testing.T, path string, data []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, data) {
		t.Errorf("%s differs from the device", filepath.Base(path))
	}
}

func TestQEMU(t *testing.T) {
	dev, path := disk(t, 40<<20)
	addr := serveDevice(t, dev)
	u := uri(addr, "disk")
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", path, u)
	out := filepath.Join(t.TempDir(), "out")
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", "-m", "8", "-W", u, out)
	wantFile(t, out, dev.content())
	target := &tryMemory{memory: newMemory(40 << 20)}
	tool(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", path, uri(serveDevice(t, target), "disk"))
	if !bytes.Equal(target.content(), dev.content()) {
		t.Error("qemu-img convert into the server: data differs")
	}

	printed := tool(t, "qemu-io", "-f", "raw", u,
		"-c", "write -P 7 4k 3M", "-c", "read -P 7 4k 3M",
		"-c", "write -f -P 8 1000 5000", "-c", "read -P 8 1000 5000",
		"-c", "write -z 1M 1M", "-c", "read -P 0 1M 1M", "-c", "write -z -u 2M 64k", "-c", "read -P 0 2M 64k",
		"-c", "discard 2M 64k", "-c", "flush", "-c", "aio_write -P 9 8M 16M", "-c", "aio_read 24M 64k", "-c", "aio_flush",
		"-c", "read -P 9 8M 16M")
	if strings.Contains(printed, "failed") {
		t.Errorf("qemu-io:\n%s", printed)
	}
}

// TestQEMUBitmap reads a dirty bitmap as backup tools made for QEMU do.
func TestQEMUBitmap(t *testing.T) {
	addr := serveDevice(t, newMemory(16384))
	out := tool(t, "qemu-img", "map", "--output=json", "--image-opts",
		"driver=nbd,server.type=unix,server.path="+addr.String()+",export=disk,x-dirty-bitmap="+dirtyBitmap)
	var extents []struct {
		Start, Length int64
		Data, Present bool
	}
	if err := json.Unmarshal([]byte(out), &extents); err != nil {
		t.Fatalf("qemu-img map: %v\n%s", err, out)
	}
	if len(extents) != 4 {
		t.Fatalf("qemu-img map\n%s\nwant 4 extents", out)
	}
	for i, e := range extents {
		if clean := i%2 == 0; e.Start != int64(i)*4096 || e.Length != 4096 || e.Data != clean {
			t.Errorf("extent %d\n got %+v\nwant start %d, length 4096, data %t", i, e, i*4096, clean)
		}
	}
}

// TestFio writes and verifies with many requests in flight.
func TestFio(t *testing.T) {
	for _, tc := range []struct{ name, bs string }{{"small", "4k-4k"}, {"mixed", "512-300k"}} {
		t.Run(tc.name, func(t *testing.T) {
			addr := serveDevice(t, &tryMemory{memory: newMemory(32 << 20)})
			tool(t, "fio", "--name=x", "--ioengine=nbd", "--uri="+uri(addr, "disk"), "--rw=randwrite", "--bsrange="+tc.bs,
				"--iodepth=32", "--size=32m", "--verify=crc32c", "--verify_state_save=0", "--fsync=64", "--bs_unaligned=1")
		})
	}
}

// TestLibnbd is an incremental copy by a libnbd client: it reads the bitmap,
// then what is dirty, in structured chunks.
func TestLibnbd(t *testing.T) {
	dev, path := disk(t, 1<<20+777)
	base := bytes.Clone(dev.data)
	for off := 4096; off < len(base); off += 8192 { // the blocks that the bitmap calls dirty
		copy(base[off:min(off+4096, len(base))], bytes.Repeat([]byte{0xaa}, 4096))
	}
	copyPath := filepath.Join(filepath.Dir(path), "copy.raw")
	if err := os.WriteFile(copyPath, base, 0o600); err != nil {
		t.Fatal(err)
	}
	const program = `
import nbd, sys
h = nbd.NBD()
h.add_meta_context(sys.argv[3])
h.connect_uri(sys.argv[1])
out = open(sys.argv[2], "r+b")
dirty = []
def extent(context, offset, entries, err):
    for n, flags in zip(entries[::2], entries[1::2]):
        if flags & 1: dirty.append((offset, n))
        offset += n
    extent.end = offset
off = extent.end = 0
while extent.end < h.get_size():
    h.block_status(min(300000, h.get_size() - extent.end), extent.end, extent)
for off, n in dirty:
    n = min(n, h.get_size() - off)
    def chunk(data, offset, status, err):
        out.seek(offset); out.write(data)
    h.pread_structured(n, off, chunk)
print(len(dirty))
try:
    h.pread(512, h.get_size())
    sys.exit("read beyond the end succeeded")
except nbd.Error as e:
    assert e.errno == "EINVAL", e
h.shutdown()
`
	addr := serveDevice(t, dev)
	out := tool(t, "/usr/bin/python3", "-c", program, uri(addr, "disk"), copyPath, dirtyBitmap)
	if n, _ := strconv.Atoi(strings.TrimSpace(out)); n < 128 {
		t.Errorf("dirty extents\n got %q\nwant at least 128", out)
	}
	wantFile(t, copyPath, dev.content())
}

// TestTLSTools connects as operators do, with certificates in files.
func TestTLSTools(t *testing.T) {
	a := newAuthority(t)
	a.issue(t, "client", nil)
	dev, path := disk(t, 4<<20)
	_, addr := startTLSServer(t, a, newShelf(map[string]Device{"disk": dev}))
	_, port, _ := net.SplitHostPort(addr.String())
	u := "nbds://localhost:" + port + "/disk?tls-certificates=" + a.dir

	if out := tool(t, "nbdinfo", u); !strings.Contains(out, "with TLS") {
		t.Errorf("nbdinfo does not say that it uses TLS:\n%s", out)
	}
	out := filepath.Join(t.TempDir(), "out")
	tool(t, "nbdcopy", u, out)
	wantFile(t, out, dev.content())
	tool(t, "qemu-img", "compare", "--object", "tls-creds-x509,id=tls0,endpoint=client,dir="+a.dir,
		"--image-opts", "driver=raw,file.driver=file,file.filename="+path,
		"driver=nbd,host=localhost,port="+port+",export=disk,tls-creds=tls0")
	if out, err := tryTool(t, "nbdinfo", "nbd://localhost:"+port+"/disk"); err == nil {
		t.Errorf("nbdinfo got through without TLS:\n%s", out)
	}
	stranger := newAuthority(t)
	stranger.issue(t, "client", nil)
	if out, err := tryTool(t, "nbdinfo", "nbds://localhost:"+port+"/disk?tls-certificates="+stranger.dir); err == nil {
		t.Errorf("nbdinfo got through with certificates of another authority:\n%s", out)
	}
}
