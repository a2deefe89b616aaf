// What serve is told: by flags, by a file in YAML with the same names, or by
// the options of a line in fstab, which become flags.

package control

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"reflect"
	"strconv"
	"strings"
	"syscall"
	"time"

	"go.yaml.in/yaml/v3"

	"blksnap/store"
)

// configFile is read where it exists and no other is named.
const configFile = "/etc/blksnap.yaml"

// Config is what serve is told, as it was given: nothing is filled in yet, and what is
// nil was not given. The tags are the flags of the command line and the keys
// of the file.
type Config struct {
	Origin []string `arg:"" optional:"" sep:"none" name:"origin" placeholder:"[NAME=]ORIGIN" yaml:"origin" help:"Raw image file or block device to protect, under its name (default: its base name without extension)."`

	Mount   string   `placeholder:"DIR" yaml:"mount" help:"Where the tree is mounted, or none (/run/blksnap; unprivileged $XDG_RUNTIME_DIR/blksnap)."`
	Run     string   `placeholder:"DIR" yaml:"run" help:"Sockets and what lives until reboot (/run/blksnapd; unprivileged $XDG_RUNTIME_DIR/blksnapd)."`
	Listen  []string `placeholder:"URI" sep:"none" yaml:"listen" help:"Serve NBD there: unix://PATH or tcp://HOST:PORT; repeatable (unix://RUN/nbd.sock)."`
	Control string   `placeholder:"PATH" yaml:"control" help:"The control socket (RUN/control.sock)."`
	Store   []string `placeholder:"SPEC" sep:"none" yaml:"store" help:"Part of the snapstore: mem[:LIMIT], file:PATH[:LIMIT] or dev:PATH; repeatable, in order of preference (file:STATE/snapstore)."`
	State   string   `placeholder:"DIR" yaml:"state" help:"What outlives a reboot (/var/lib/blksnap; unprivileged $XDG_STATE_HOME/blksnap)."`
	File    string   `placeholder:"FILE" name:"config" yaml:"-" help:"The same settings in YAML (/etc/blksnap.yaml where it exists); flags win."`

	TLSCerts       string `name:"tls-certs" placeholder:"DIR" yaml:"tls-certs" help:"Offer TLS with the certificates in DIR (ca-cert.pem, server-cert.pem, server-key.pem) to clients with one of that authority."`
	AllowPlaintext *bool  `negatable:"" yaml:"allow-plaintext" help:"Serve other machines without TLS, too: anybody who reaches the socket can read and write the disks."`

	IdleTimeout *time.Duration `placeholder:"DURATION" yaml:"idle-timeout" help:"Drop an NBD client that sends nothing, or takes no reply, for so long; its disk is gone then unless it reconnects (never)."`

	OnStoreLow *string `placeholder:"CMD" yaml:"on-store-low" help:"Run CMD with sh when the snapstore runs low, with its figures in the environment: BLKSNAP_STORE_SIZE, _FREE, _RATE (bytes a second), _LEFT (seconds), and BLKSNAP_CONTROL."`

	AllowOther *bool `negatable:"" yaml:"allow-other" help:"Show the tree to other users too."`
	Force      *bool `negatable:"" yaml:"force" help:"Take a store's file or device although it holds something else."`

	DeviceConfig `yaml:",inline"`
}

// DeviceConfig is what can be set for each device when it is added.
type DeviceConfig struct {
	TrackingBlock Size           `placeholder:"SIZE" yaml:"tracking-block" json:"tracking_block,omitempty" help:"Unit of the changed-block map, a power of two from 4KiB to 16MiB (what it was; 64KiB for a new device). Another one begins a new generation."`
	StoreWait     *time.Duration `placeholder:"DURATION" yaml:"store-wait" json:"store_wait,omitempty" help:"How long a write waits for space in a full snapstore before snapshots are lost (0s)."`
}

// The tracking blocks that a device can have, in bytes.
const (
	minTrackingBlock = 4 << 10
	maxTrackingBlock = 16 << 20
)

// check refuses what no device can have (EINVAL). A tracking block that was not
// given stays so: the device may have one already.
func (c DeviceConfig) check() error {
	if b := c.TrackingBlock; b != 0 && (b < minTrackingBlock || b > maxTrackingBlock || b&(b-1) != 0) {
		return refuse(syscall.EINVAL, "tracking block of %d bytes is not a power of two from 4KiB to 16MiB", b)
	}
	if wait := given(c.StoreWait); wait < 0 {
		return refuse(syscall.EINVAL, "store wait of %s is less than nothing", wait)
	}
	return nil
}

// given is what p points to, and the zero value where it was not given.
func given[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// Size is a number of bytes that reads 512, 64KiB, 10GiB or 1TiB.
type Size int64

// UnmarshalText reads a size from a flag or a file.
func (s *Size) UnmarshalText(text []byte) error {
	n, err := store.ParseSize(string(text))
	*s = Size(n)
	return err
}

// MarshalText writes what UnmarshalText reads.
func (s Size) MarshalText() ([]byte, error) { return strconv.AppendInt(nil, int64(s), 10), nil }

// withFile adds what the configuration file says to what the flags left open.
// A list that was given as flags replaces the file's.
func (c Config) withFile() (Config, error) {
	f, err := readConfig(cmp.Or(c.File, configFile))
	if c.File == "" && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission)) {
		return c, nil // there is none, or it is not for this user
	}
	if err != nil {
		return c, err
	}
	pick := func(flag, file []string) []string {
		if len(flag) > 0 {
			return flag
		}
		return file
	}
	c.Origin = pick(c.Origin, f.Origin)
	c.Listen = pick(c.Listen, f.Listen)
	c.Store = pick(c.Store, f.Store)
	c.Mount = cmp.Or(c.Mount, f.Mount)
	c.Run = cmp.Or(c.Run, f.Run)
	c.Control = cmp.Or(c.Control, f.Control)
	c.State = cmp.Or(c.State, f.State)
	c.TrackingBlock = cmp.Or(c.TrackingBlock, f.TrackingBlock)
	c.StoreWait = cmp.Or(c.StoreWait, f.StoreWait)
	c.TLSCerts = cmp.Or(c.TLSCerts, f.TLSCerts)
	c.AllowPlaintext = cmp.Or(c.AllowPlaintext, f.AllowPlaintext)
	c.IdleTimeout = cmp.Or(c.IdleTimeout, f.IdleTimeout)
	c.OnStoreLow = cmp.Or(c.OnStoreLow, f.OnStoreLow)
	c.AllowOther = cmp.Or(c.AllowOther, f.AllowOther)
	c.Force = cmp.Or(c.Force, f.Force)
	return c, nil
}

// readConfig reads settings from the file at path. Its errors name the file
// and, where there is one, the line. A key that no flag has is refused.
func readConfig(path string) (c Config, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return c, fmt.Errorf("read configuration: %w", err)
	}
	var root yaml.Node
	d := yaml.NewDecoder(bytes.NewReader(text))
	switch err := d.Decode(&root); {
	case errors.Is(err, io.EOF): // nothing but comments
		return c, nil
	case err != nil:
		return c, fmt.Errorf("read configuration %s: %s", path, oneLine(err))
	}
	if err := d.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return c, fmt.Errorf("read configuration %s: it holds more than one document", path)
	}
	top := root.Content[0]
	if top.Kind != yaml.MappingNode {
		return c, fmt.Errorf("read configuration %s: it is not a list of KEY: VALUE", path)
	}
	fields := configFields(reflect.TypeFor[Config]())
	for i := 0; i < len(top.Content); i += 2 {
		key, value := top.Content[i], top.Content[i+1]
		kind, ok := fields[key.Value]
		if !ok {
			return c, fmt.Errorf("read configuration %s: line %d: unknown key %q", path, key.Line, clip(key.Value))
		}
		if kind == reflect.Slice && value.Kind == yaml.ScalarNode { // a list of one, without brackets
			top.Content[i+1] = &yaml.Node{Kind: yaml.SequenceNode, Line: value.Line, Content: []*yaml.Node{value}}
		}
	}
	if err := top.Decode(&c); err != nil {
		return c, fmt.Errorf("read configuration %s: %s", path, oneLine(err))
	}
	return c, nil
}

// configFields are the keys that struct t reads from YAML, and what they hold.
func configFields(t reflect.Type) map[string]reflect.Kind {
	fields := map[string]reflect.Kind{}
	for f := range t.Fields() {
		switch tag := f.Tag.Get("yaml"); tag {
		case "-":
		case ",inline":
			maps.Copy(fields, configFields(f.Type))
		default:
			fields[tag] = f.Type.Kind()
		}
	}
	return fields
}

// oneLine makes one line of the YAML package's errors, which list all that was
// wrong, and drops its name for itself.
func oneLine(err error) string {
	if t, ok := errors.AsType[*yaml.TypeError](err); ok {
		return t.Errors[0]
	}
	return strings.TrimPrefix(err.Error(), "yaml: ")
}
