// TLS, section "TLS support".

package intercept

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
)

// startTLS replaces the connection by one inside TLS. It reads nothing ahead:
// what a client sent before TLS began is taken for a part of TLS, and refused.
func (h *handshake) startTLS(ctx context.Context, data []byte) error {
	const id = NBD_OPT_STARTTLS
	switch {
	case h.tls:
		h.fail(id, NBD_REP_ERR_INVALID, "TLS has begun already")
		return nil
	case data == nil || len(data) > 0:
		h.fail(id, NBD_REP_ERR_INVALID, "STARTTLS takes no data")
		return nil
	case h.server.opts.TLS == nil:
		h.fail(id, NBD_REP_ERR_POLICY, "this server has no certificate")
		return nil
	}
	h.ack(id)
	if err := h.out.Flush(); err != nil {
		return fmt.Errorf("send reply to STARTTLS: %w", err)
	}
	conn := tls.Server(h.conn, h.server.opts.TLS)
	if err := conn.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("begin TLS: %w", err)
	}
	h.conn, h.out, h.tls = conn, bufio.NewWriter(conn), true
	h.style, h.metaFor, h.contexts = simple, "", nil
	if certs := conn.ConnectionState().PeerCertificates; len(certs) > 0 {
		h.client += " " + certs[0].Subject.String()
	}
	return nil
}
